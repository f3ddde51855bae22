"""Programs of torch.export over HTTP: uploaded, trained by sites with torch or without, and asked."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save
from torch import nn

from fl_server_ai.inference import pool
from fl_server_core.models import GlobalModel, LocalModel, User
from tests.ai.test_sandbox_exported import edited
from tests.api.test_inference import (
    INPUT,
    OWNER,
    X,
    ask,
    drawn_network,
    network,
    options,
    swag_training,
    upload,
)
from tests.api.test_torch_models import download, training_of
from tests.scenes import person

pytestmark = pytest.mark.django_db


@pytest.fixture(scope="module", autouse=True)
def children() -> Any:
    yield
    pool.close()


@pytest.fixture
def owner() -> User:
    return person("owner", id=OWNER, actor=True)


@pytest.fixture
def client(login, owner: User) -> Any:
    return login(owner)


def exported(module: nn.Module, *, rows: int = 2, free: bool = True) -> bytes:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if free else None
    program = torch.export.export(module.eval(), (torch.zeros(rows, 4),), dynamic_shapes=shapes)
    return saved(program)


def saved(program: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    return torch.export.load(io.BytesIO(data))


def test_sites_train_the_program_that_they_download_and_send_it_or_its_weights(
    client, login, owner: User
) -> None:
    running = training_of(upload(client, exported(network())), owner)
    path = f"/api/models/{running.training.model_id}/"
    sent: list[dict[str, np.ndarray]] = []

    for index, name in enumerate(running.sites):
        site = login(running.sites[name])
        program = loaded(download(site, path))
        with torch.no_grad():
            for parameter in program.module().parameters():
                parameter.add_(index + 1.0)
        state = {key: tensor.detach().numpy() for key, tensor in program.state_dict.items()}
        sent.append({key: array.copy() for key, array in state.items()})
        data = [saved(program), save(state), saved(program)][index]
        body = {"round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", data)}
        assert site.post(path, body, format="multipart").status_code == 201
    running.work()

    site = login(running.sites["ada"])
    result = loaded(download(site, path))
    plain = load(download(site, path, HTTP_ACCEPT="application/vnd.safetensors"))
    for key, tensor in result.state_dict.items():
        mean = np.mean([one[key].astype(np.float64) for one in sent], axis=0).astype(np.float32)
        np.testing.assert_array_equal(tensor.detach().numpy(), mean)
        np.testing.assert_array_equal(plain[key], mean)
    answer = ask(client, str(running.training.model_id), options=options(task="regression"))
    np.testing.assert_allclose(
        answer.json()["inference"], result.module()(X).detach(), rtol=1e-5, atol=1e-6
    )


def test_a_program_comes_back_byte_for_byte(client) -> None:
    data = exported(network())

    model = upload(client, data)

    assert download(client, f"/api/models/{model}/") == data
    assert GlobalModel.objects.get().container == "torch_export"


def test_a_program_is_asked_plainly_and_with_dropout(client) -> None:
    model = upload(client, exported(network()))
    how = {"uncertainty_method": "MC_DROPOUT", "options": options(N=20, seed=4, output="logits")}

    plain = ask(client, model).json()
    one, two = (ask(client, model, **how).json() for _ in range(2))

    assert plain["inference"] == network()(X).argmax(1).tolist()
    assert one["inference"] == two["inference"]
    assert (np.array(one["uncertainty"]["variance"]) > 0).all()


def test_swag_draws_the_weights_of_a_program(client, owner: User) -> None:
    running = swag_training(owner, upload(client, exported(network())))

    body = ask(
        client,
        str(running.training.model_id),
        options=options(N=6, seed=9, task="regression"),
    ).json()

    draws = torch.stack([drawn_network(running, 9, draw)(X) for draw in range(6)]).double()
    np.testing.assert_allclose(body["inference"], draws.mean(0).detach(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_another_size_than_the_program_was_exported_for_is_explained(client) -> None:
    model = upload(client, exported(network(), rows=3, free=False))

    answer = ask(client, model)

    assert (answer.status_code, answer.json()["code"]) == (400, "INPUT_SHAPE")
    assert "[3, 4], not [2, 4]" in answer.json()["detail"]
    assert "Dim.DYNAMIC" in answer.json()["detail"]
    right = ask(client, model, [*INPUT, INPUT[0]])
    assert right.status_code == 200, right.json()


def test_a_program_exported_on_a_gpu_runs_where_the_worker_runs(client, tmp_path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(exported(network()))
    on_gpu = b'{"type": "cuda", "index": 0}'
    for entry in ("data/weights/model_weights_config.json", "models/model.json"):
        edited(path, entry, lambda data: data.replace(b'{"type": "cpu", "index": null}', on_gpu))

    answer = ask(client, upload(client, path.read_bytes()))

    assert answer.status_code == 200, answer.json()
    assert answer.json()["inference"] == network()(X).argmax(1).tolist()


def test_a_program_with_a_forbidden_operator_is_refused_where_it_would_run(
    client, tmp_path
) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(exported(network()))
    edited(path, "models/model.json", lambda data: data.replace(b"aten.linear", b"aten.from_file"))

    answer = ask(client, upload(client, path.read_bytes()))

    assert (answer.status_code, answer.json()["code"]) == (422, "FORBIDDEN_OPERATOR")


def test_an_update_with_other_tensors_is_refused(client, login, owner: User) -> None:
    running = training_of(upload(client, exported(network())), owner)
    other = exported(nn.Sequential(nn.Linear(4, 3)))

    body = {"round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", other)}
    answer = login(running.sites["ada"]).post(
        f"/api/models/{running.training.model_id}/", body, format="multipart"
    )

    assert (answer.status_code, answer.json()["code"]) == (422, "KEY_MISMATCH")
    assert not LocalModel.objects.exists()
