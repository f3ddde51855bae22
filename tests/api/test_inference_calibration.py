"""SWAG over HTTP: distinct draws, low rank too, and BatchNorm's statistics of each draw from a calibration batch."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save
from torch import nn

from fl_client import SwagCollector
from fl_client.torch_support import get_weights
from fl_server_ai.inference import pool
from fl_server_ai.inference.tasks import run_inference
from fl_server_ai.services.moments import moments_submit
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_ai.uncertainty.swag import draw_weights
from fl_server_core.models import GlobalModel, User
from tests.api.test_inference import NETWORK, ask, network, options, scripted, upload
from tests.scenes import Arrays, Scene, person, staged

pytestmark = pytest.mark.django_db
OWNER = uuid.UUID(int=7)
DRAWS = 4


def normed() -> nn.Module:
    """Four numbers to three, with BatchNorm in between."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


X = torch.randn(5, 4, generator=torch.manual_seed(1))
BATCH = torch.randn(32, 4, generator=torch.manual_seed(2)) * 3 + 1


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    pool.close()


@pytest.fixture
def client(login) -> Any:
    return login(person("owner", id=OWNER, actor=True))


def collected(module: nn.Module) -> tuple[Arrays, Arrays]:
    """Moments along some steps, of buffers too: existing clients send whole state dicts."""
    draw = np.random.default_rng(0)
    collector = SwagCollector()
    for _ in range(6):
        steps = {
            name: array + draw.normal(scale=0.3, size=array.shape).astype(np.float32)
            for name, array in get_weights(module).items()
            if array.dtype.kind == "f"
        }
        collector.add(steps)
    found = collector.result(1)
    return dict(found.first), dict(found.second)


def trained(
    client: Any, data: bytes, first: Arrays, second: Arrays, deviations: Arrays | None = None
) -> Scene:
    """A training of one site and one round, with these moments."""
    owner, ada = User.objects.get(pk=OWNER), person("ada", client=True)
    training = training_create(
        actor=owner, model=GlobalModel.objects.get(pk=upload(client, data)), target_num_updates=1,
        aggregation_method="FedAvg", uncertainty_method="SWAG",
        options={"skip_model_tests": True, "swag_rank": 4 if deviations else 0}, clients=[ada.pk],
    )  # fmt: skip
    training_start(training=training, user=owner)
    running = Scene(owner, {"ada": ada}, training.model, training)
    where = {"model_id": training.model_id, "owner": ada, "sample_size": 1}
    update_submit(**where, round=0, file=staged(data), sha256=None, metrics={})
    running.work()
    moments_submit(
        **where, round=1, first=staged(save(first)), second=staged(save(second)),
        deviations=staged(save(deviations)) if deviations else None,
    )  # fmt: skip
    running.work()
    return running


def drawn(first: Arrays, second: Arrays, draw: int) -> nn.Module:
    """Draw number `draw`, as torch calibrates it."""
    module = normed()
    halves = ({n: torch.from_numpy(a) for n, a in half.items()} for half in (first, second))
    found = dict(draw_weights(*halves, seed=3, draw=draw, keep=["1.running_mean", "1.running_var"]))
    state = {**module.state_dict(), **{name: tensor.float() for name, tensor in found.items()}}
    module.load_state_dict(state)
    torch.optim.swa_utils.update_bn([BATCH], module)
    return module.eval()


def test_statistics_of_each_draw_are_those_of_the_calibration_batch(client) -> None:
    first, second = collected(normed())
    model = str(trained(client, scripted(normed()), first, second).training.model_id)
    how = {"options": options(N=DRAWS, seed=3, task="regression")}

    told = ask(client, model, X.tolist(), calibration_input=BATCH.tolist(), **how)
    plain = ask(client, model, X.tolist(), **how)

    outputs = torch.stack([drawn(first, second, i)(X) for i in range(DRAWS)]).double().detach()
    body = told.json()
    np.testing.assert_allclose(body["inference"], outputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        body["uncertainty"]["variance"], outputs.var(0), rtol=1e-3, atol=1e-6
    )
    assert body["notes"] == []
    assert np.abs(np.array(plain.json()["inference"]) - body["inference"]).max() > 0.05


def test_a_report_judges_the_calibrated_draws(client) -> None:
    first, second = collected(normed())
    model = str(trained(client, scripted(normed()), first, second).training.model_id)
    how = {
        "model_input": X.tolist(), "labels": [0, 1, 2, 0, 1],
        "options": options(N=DRAWS, seed=3, output="logits"),
    }  # fmt: skip
    url = f"/api/models/{model}/calibration/"

    posted = client.post(url, {**how, "calibration_input": BATCH.tolist()}, format="json")
    refused = client.post(
        url,
        {**how, "calibration_input": BATCH.tolist(), "uncertainty_method": "NONE"},
        format="json",
    )

    assert posted.status_code == 202, posted.json()
    report = _run(client, posted.json()["url"]).json()
    probs = torch.stack([drawn(first, second, i)(X).softmax(1) for i in range(DRAWS)]).mean(0)
    wanted = -probs[range(5), how["labels"]].log().mean().item()
    assert report["nll"] == pytest.approx(wanted, rel=1e-4)
    assert report["notes"] == []
    assert (refused.status_code, refused.json()["code"]) == (400, "NO_CALIBRATION")


def test_a_calibration_file_does_the_same_and_without_batch_norm_the_answer_says_so(client) -> None:
    module = nn.Sequential(nn.Linear(4, 3)).eval()
    model = str(trained(client, scripted(module), *collected(module)).training.model_id)

    def files(**more: Any) -> dict[str, Any]:
        file = SimpleUploadedFile("x", save({"x": X.numpy()}))
        text = json.dumps(options(N=2, task="regression"))
        return {"model_id": model, "model_input": file, "options": text, **more}

    batch = SimpleUploadedFile("c", save({"c": BATCH.numpy()}))
    asked = client.post("/api/inference/", files(calibration_input=batch), format="multipart")
    pending = asked.json()["url"]
    from_json = ask(
        client, model, X.tolist(), calibration_input=BATCH.tolist(),
        options=options(N=2, task="regression"),
    )  # fmt: skip
    plain = ask(client, model, X.tolist(), options=options(N=2, task="regression"))
    client_file = _run(client, pending)

    assert json.loads(client_file["X-FL-Notes"])[0].startswith("CALIBRATION_UNUSED")
    assert from_json.json()["notes"] == json.loads(client_file["X-FL-Notes"])
    assert plain.json()["notes"] == []
    for body in (from_json.json(), plain.json()):
        np.testing.assert_allclose(load(client_file.content)["inference"], body["inference"])


def _run(client: Any, url: str) -> Any:
    run_inference(int(url.rstrip("/").rpartition("/")[2]))
    return client.get(url)


def test_what_is_wrong_with_a_calibration_batch_is_named(client) -> None:
    first, second = collected(normed())
    model = str(trained(client, scripted(normed()), first, second).training.model_id)
    GlobalModel.objects.update(input_shape=[None, 4])
    plain = upload(client, NETWORK)

    answers = [
        ask(client, plain, X.tolist(), calibration_input=BATCH.tolist()),
        ask(client, model, X.tolist(), calibration_input=[[1.0, 2.0]]),
        ask(client, model, X.tolist(), calibration_input="no base64"),
        ask(client, model, X.tolist(), calibration_input=[[0.5, 1.0, 2.0, 3.0]]),
    ]

    found = [(a.status_code, a.json()["code"]) for a in answers]
    assert found == [
        (400, "NO_CALIBRATION"),
        (400, "INPUT_SHAPE"),
        (400, "BAD_INPUT"),
        (422, "PROGRAM_FAILED"),
    ]
    assert {a.json()["errors"][0]["pointer"] for a in answers[:3]} == {"/calibration_input"}
    assert "more than 1 value" in answers[3].json()["detail"]


@pytest.mark.parametrize("rank", [0, 4])
def test_draws_are_distinct_seeded_and_repeatable(client, rank: int) -> None:
    module = network()
    collector = SwagCollector(rank=rank)
    for step in range(6):
        torch.manual_seed(step)
        collector.add({n: t + 0.1 * torch.randn_like(t) for n, t in module.state_dict().items()})
    found = collector.result(1)
    first, second = dict(found.first), dict(found.second)
    columns = dict(found.deviations) if found.deviations else None
    running = trained(client, NETWORK, first, second, columns)
    model = str(running.training.model_id)

    def asked(seed: int) -> Any:
        return ask(client, model, X.tolist(), options=options(N=5, seed=seed, task="regression"))

    one, again, other = asked(3), asked(3), asked(4)

    moments = running.now.moments.get(owner=None)
    assert (moments.deviations is not None) == bool(rank)
    outputs = []
    for draw in range(5):
        halves = ({n: torch.from_numpy(a) for n, a in half.items()} for half in (first, second))
        stacked = {n: torch.from_numpy(a) for n, a in columns.items()} if columns else None
        drawn_state = dict(draw_weights(*halves, seed=3, draw=draw, deviations=stacked))
        module.load_state_dict({name: tensor.float() for name, tensor in drawn_state.items()})
        outputs.append(module(X).double().detach())
    stack = torch.stack(outputs)
    body = one.json()
    np.testing.assert_allclose(body["inference"], stack.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(body["uncertainty"]["variance"], stack.var(0), rtol=1e-3, atol=1e-6)
    assert torch.pdist(stack.flatten(1)).min() > 1e-3
    assert body["inference"] == again.json()["inference"] != other.json()["inference"]
