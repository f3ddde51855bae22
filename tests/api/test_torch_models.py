"""Clients that only know torch: what they upload and download over HTTP are files of torch's own."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from django.conf import settings as django_settings
from django.core.files.uploadedfile import SimpleUploadedFile
from torch import Tensor, nn

from fl_server_ai.services.trainings import training_create, training_start
from fl_server_core.models import Blob, GlobalModel, LocalModel, Training
from fl_server_core.services.blobs import blobs_delete_doomed
from tests.scenes import Scene, person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(nn.Module):
    """Tied layers, a buffer that counts, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.last = self.first
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)))


def saved(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def scripted(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def rescripted(module: Any) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def upload(client: Any, data: bytes, name: str = "net") -> Any:
    body = {"name": name, "description": "-", "model_file": SimpleUploadedFile("m", data)}
    return client.post("/api/models/", body, format="multipart")


def download(client: Any, path: str, **headers: str) -> bytes:
    response = client.get(path, **headers)
    assert response.status_code == 200, response.content
    return b"".join(response.streaming_content)


def stored() -> set[Path]:
    folder = Path(django_settings.FL_DATA_DIR) / "weights"
    return {path for path in folder.rglob("*") if path.is_file()}


def training_of(model_id: str, actor: Any, **options: Any) -> Scene:
    sites = {name: person(name, client=True) for name in ("ada", "grace", "joan")}
    model = GlobalModel.objects.get(pk=model_id)
    training = training_create(
        actor=actor, model=model, target_num_updates=2, aggregation_method="FedAvg",
        options={"skip_model_tests": True, **options}, clients=[user.pk for user in sites.values()],
    )  # fmt: skip
    training_start(training=training, user=actor)
    return Scene(actor, sites, training.model, training)


def test_a_script_model_is_trained_by_clients_that_send_every_kind_of_torch_file(login) -> None:
    actor = person("actor", actor=True)
    start = Net()
    answer = upload(login(actor), scripted(start))
    running = training_of(answer.json()["model_id"], actor)
    path = f"/api/models/{running.training.model_id}/"

    expected: dict[str, list[Tensor]] = {}
    for index, name in enumerate(running.sites):
        client = login(running.sites[name])
        module = torch.jit.load(io.BytesIO(download(client, path)))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(index + 1.0)
        state = module.state_dict()
        for key, tensor in state.items():
            expected.setdefault(key, []).append(tensor.clone())
        data = [saved(state), rescripted(module), saved(dict(state))][index]
        body = {
            "round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", data),
        }  # fmt: skip
        sent = client.post(path, body, format="multipart")
        assert sent.status_code == 201, sent.content
    running.work()

    result = torch.jit.load(io.BytesIO(download(login(running.sites["ada"]), path)))
    for key, tensor in result.state_dict().items():
        mean = torch.stack([one.double() for one in expected[key]]).mean(0).to(tensor.dtype)
        assert torch.equal(tensor, mean), key
    assert (
        result.state_dict()["first.weight"].data_ptr()
        == result.state_dict()["last.weight"].data_ptr()
    )
    assert result(torch.ones(2, 2)).shape == (2, 2)


@pytest.mark.parametrize("container", ["state dict", "module"])
def test_a_torch_save_model_comes_back_as_it_was_uploaded(login, container: str) -> None:
    actor = person("actor", actor=True)
    net = Net()
    data = saved(net.state_dict() if container == "state dict" else net)

    answer = upload(login(actor), data)

    path = f"/api/models/{answer.json()['model_id']}/"
    assert download(login(actor), path) == data
    assert download(login(actor), path, HTTP_ACCEPT="application/vnd.safetensors") != data


def test_tied_tensors_must_arrive_equal(login) -> None:
    actor = person("actor", actor=True)
    running = training_of(upload(login(actor), saved(Net())).json()["model_id"], actor)
    state = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    state["last.weight"] = state["first.weight"].clone()
    state["last.bias"] = state["first.bias"] + 1
    path = f"/api/models/{running.training.model_id}/"

    body = {"round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", saved(state))}
    response = login(running.sites["ada"]).post(path, body, format="multipart")

    assert (response.status_code, response.json()["code"]) == (422, "TIED_MISMATCH")
    assert "last.bias" in response.json()["detail"]
    assert not LocalModel.objects.exists()


def test_a_wrapper_around_the_module_is_named(login) -> None:
    actor = person("actor", actor=True)
    running = training_of(upload(login(actor), saved(Net())).json()["model_id"], actor)
    path = f"/api/models/{running.training.model_id}/"

    wrapped = saved(nn.DataParallel(Net()))
    body = {"round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", wrapped)}
    response = login(running.sites["ada"]).post(path, body, format="multipart")

    assert (response.status_code, response.json()["code"]) == (422, "KEY_MISMATCH")
    assert "'module.'" in response.json()["detail"]


def test_a_model_without_tensors_is_refused_and_preprocessing_without_them_is_not(login) -> None:
    actor = person("actor", actor=True)
    client = login(actor)
    empty = scripted(nn.Sequential(nn.ReLU()))

    refused = upload(client, empty)
    body = {
        "name": "net", "description": "-", "model_file": SimpleUploadedFile("m", saved(Net())),
        "model_preprocessing_file": SimpleUploadedFile("p", empty),
    }  # fmt: skip
    accepted = client.post("/api/models/", body, format="multipart")

    assert (refused.status_code, refused.json()["code"]) == (422, "NO_TENSORS")
    assert accepted.status_code == 201
    assert download(client, f"/api/models/{accepted.json()['model_id']}/preprocessing/") == empty


def test_the_uploaded_file_lives_as_long_as_a_model_needs_it(login) -> None:
    before = stored()
    actor = person("actor", actor=True)
    client = login(actor)
    first = upload(client, saved(Net())).json()["model_id"]
    sites = [person("ada", client=True).pk]
    for _ in range(2):  # the second training gets a clone of the model
        training_create(
            actor=actor, model=GlobalModel.objects.get(pk=first), target_num_updates=1,
            aggregation_method="FedAvg", options={}, clients=sites,
        )  # fmt: skip
    clone = GlobalModel.objects.exclude(pk=first).get()
    assert clone.template_id == GlobalModel.objects.get(pk=first).template_id
    assert clone.ties == [["first.weight", "last.weight"], ["first.bias", "last.bias"]]

    for training in Training.objects.all():
        assert client.delete(f"/api/trainings/{training.pk}/").status_code == 200
    for model in list(GlobalModel.objects.values_list("pk", flat=True)):
        assert client.delete(f"/api/models/{model}/").status_code == 200
        blobs_delete_doomed()

    assert not Blob.objects.exists()
    assert stored() <= before


def test_what_many_fetch_is_made_once(login, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_server_ai.services import models as service

    actor = person("actor", actor=True)
    path = f"/api/models/{upload(login(actor), saved(Net())).json()['model_id']}/"
    made = []
    real = service.write_back
    monkeypatch.setattr(service, "write_back", lambda *args: made.append(args) or real(*args))

    first, second = (download(login(actor), path) for _ in range(2))

    assert first == second
    assert len(made) == 1
