"""`stats` of a model's metadata: counted once for an architecture, in the sandbox, and right."""

from typing import Any

import pytest
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from fl_server_ai.inference import pool
from fl_server_ai.inference.tasks import run_inference
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.trainings import training_create
from fl_server_core.models import GlobalModel, InferenceJob, ModelStatistics, User
from fl_server_core.services.inference import job_claim, job_lease_drop
from fl_server_core.services.statistics import statistics_delete_unused
from fl_server_core.storage import weights_storage
from tests.api.test_inference import OWNER, mean_of, network, scripted, upload
from tests.api.test_torch_export_models import saved
from tests.scenes import person, weights

pytestmark = pytest.mark.django_db


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, groups=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """A container, tied layers, layers without parameters, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = Sub()
        self.drop = nn.Dropout()
        self.last = nn.Linear(4 * 36, 3)
        self.again = self.last
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.up = nn.ConvTranspose1d(1, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.drop(self.sub(x)).flatten(1)) * self.scale
        return self.up(out[:, None]).flatten(1)


def exported(module: nn.Module) -> bytes:
    free = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.zeros(2, 1, 8, 8),)
    return saved(torch.export.export(module.eval(), example, dynamic_shapes=free))


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


def metadata(client: Any, model: str) -> dict[str, Any]:
    answer = client.get(f"/api/models/{model}/metadata/")
    assert answer.status_code == 200, answer.content
    return dict(answer.json())


def work() -> None:
    for job in InferenceJob.objects.filter(state="pending"):
        run_inference(job.pk)


@pytest.mark.parametrize("kind", ["torchscript", "torch_export"])
def test_a_program_is_counted_layer_by_layer(client, kind: str) -> None:
    make = scripted if kind == "torchscript" else exported
    model = upload(client, make(Net()), input_shape=["None", 1, 8, 8])

    before = metadata(client, model)
    work()
    after = metadata(client, model)

    assert (before["stats"], before["stats_state"], before["stats_error"]) == (
        None,
        "pending",
        None,
    )
    assert after["stats_state"] == "done"
    stats = after["stats"]
    parameters = list(Net().parameters())  # tied ones once
    assert stats["total_params"] == sum(p.numel() for p in parameters)
    assert stats["trainable_params"] == stats["total_params"] - 3
    assert stats["total_param_bytes"] == 4 * stats["total_params"]
    conv, linear, up = 4 * 36 * 9, 4 * 36 * 3, 3 * 2 * 2
    assert stats["total_mult_adds"] == conv + linear + up
    assert (stats["input_size"], stats["total_input"]) == ([[1, 1, 8, 8]], 4 * 64)
    layers = {layer["path"]: layer for layer in stats["summary_list"]}
    assert set(layers) == {"", "sub", "sub.conv", "sub.norm", "drop", "last", "again", "up"}
    assert layers["sub.conv"]["class_name"] == "Conv2d"
    assert layers["sub.conv"]["output_size"] == [1, 4, 6, 6]
    assert layers["sub.conv"]["kernel_size"] == [3, 3]
    assert (layers["sub.conv"]["macs"], layers["last"]["macs"]) == (conv, linear)
    assert layers["last"]["output_size"] == [1, 3]
    assert layers["up"]["output_size"] == [1, 2, 4]
    assert layers["again"]["is_recursive"]
    assert layers["sub"]["num_params"] == 4 * 9 + 4 + 8
    assert (layers["sub"]["depth"], layers["sub.conv"]["depth"]) == (1, 2)
    assert not layers["sub"]["is_leaf_layer"]
    assert layers["drop"]["output_size"] is None  # nothing that could be seen tells it


def test_products_agree_with_torchs_own_counter(client) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, groups=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, groups=3),
        nn.ConvTranspose2d(6, 4, 2), nn.Flatten(2), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    model = upload(client, scripted(module), input_shape=["None", 1, 8, 8])
    metadata(client, model)
    work()

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.zeros(1, 1, 8, 8))

    stats = metadata(client, model)["stats"]
    assert 2 * stats["total_mult_adds"] == counter.get_total_flops()
    assert stats["summary_list"][-1]["output_size"] == [1, 4, 5]


def test_products_that_are_not_known_are_not_made_up(client) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model = upload(client, scripted(Recurrent()), input_shape=["None", 3, 4])
    metadata(client, model)
    work()

    stats = metadata(client, model)["stats"]
    rows = {row["path"]: row for row in stats["summary_list"]}
    expected = sum(p.numel() for p in Recurrent().parameters())
    assert (stats["total_params"], rows["rnn"]["num_params"]) == (expected, expected)
    assert stats["total_mult_adds"] in {None, 3 * (4 * 20 + 5 * 20)}
    assert stats["input_size"] == [[1, 3, 4]]


def test_models_of_one_architecture_are_counted_once(client, owner: User) -> None:
    data = scripted(Net())
    one, two = (upload(client, data, input_shape=["None", 1, 8, 8]) for _ in range(2))
    other = upload(client, data, input_shape=["None", 1, 9, 9])

    metadata(client, one), metadata(client, one), metadata(client, two)
    assert InferenceJob.objects.count() == 1
    work()

    assert metadata(client, one)["stats"] == metadata(client, two)["stats"]
    assert metadata(client, other)["stats_state"] == "pending"
    assert ModelStatistics.objects.count() == 2
    site = [person("ada", client=True).pk]
    for _ in range(2):  # the second training gets a clone
        training_create(
            actor=owner, model=GlobalModel.objects.get(pk=one), target_num_updates=1,
            aggregation_method="FedAvg", options={}, clients=site,
        )  # fmt: skip
    clone = GlobalModel.objects.order_by("-created_at").first()
    assert clone is not None
    assert metadata(client, str(clone.pk))["stats_state"] == "done"


def test_weights_alone_are_counted_by_their_names(client) -> None:
    model = upload(client, save(weights()))

    body = metadata(client, model)

    stats = body["stats"]
    assert body["stats_state"] == "done"
    assert (stats["total_params"], stats["trainable_params"]) == (3 * 2 + 3 + 1, None)
    assert (stats["total_mult_adds"], stats["input_size"]) == (None, None)
    assert [(row["path"], row["num_params"]) for row in stats["summary_list"]] == [
        ("", 10), ("layer", 9),
    ]  # fmt: skip
    assert not InferenceJob.objects.exists()


def test_weights_far_away_are_fetched_by_a_worker_only(client, settings, monkeypatch) -> None:
    near = metadata(client, upload(client, save(weights())))["stats"]
    ModelStatistics.objects.all().delete()
    far = {"BACKEND": "django.core.files.storage.InMemoryStorage"}
    settings.STORAGES = {**settings.STORAGES, "weights": far}
    model = upload(client, save(weights()))
    opened = []
    storage = weights_storage()
    monkeypatch.setattr(
        storage, "open", lambda *a: opened.append(a) or type(storage).open(storage, *a)
    )

    before = metadata(client, model)
    asked = len(opened)
    work()
    after = metadata(client, model)

    assert (before["stats_state"], asked) == ("pending", 0)
    assert (after["stats_state"], len(opened)) == ("done", 1)
    assert after["stats"] == near


def test_a_model_that_awaits_weights_has_none_yet(client) -> None:
    body = {"name": "new", "description": "", "initial_weights": "client"}
    model = client.post("/api/models/", body).json()["model_id"]

    told = metadata(client, model)

    assert (told["stats"], told["stats_state"]) == (None, "none")
    assert not ModelStatistics.objects.exists()


def test_without_an_input_shape_only_parameters_are_counted(client) -> None:
    model = upload(client)
    metadata(client, model)
    work()

    stats = metadata(client, model)["stats"]

    assert stats["total_params"] == sum(p.numel() for p in network().parameters())
    assert (stats["total_mult_adds"], stats["input_size"], stats["run_failed"]) == (None,) * 3


def test_a_run_that_fails_leaves_the_parameters_and_says_why(client) -> None:
    model = upload(client, exported(Net()), input_shape=["None", 1, 5, 5])
    metadata(client, model)
    work()

    stats = metadata(client, model)["stats"]

    assert stats["total_params"] > 0
    assert (stats["total_mult_adds"], stats["input_size"]) == (None, None)
    assert "[any, 1, 8, 8]" in stats["run_failed"]


def test_tokens_are_tried_where_numbers_fail(client) -> None:
    model = upload(client, scripted(nn.Sequential(nn.Embedding(5, 2))), input_shape=["None", 7])
    metadata(client, model)
    work()

    stats = metadata(client, model)["stats"]

    assert (stats["total_input"], stats["total_mult_adds"]) == (8 * 7, 0)
    assert stats["summary_list"][-1]["output_size"] == [1, 7, 2]


def test_a_worker_that_dies_is_replaced_and_at_last_given_up(client, settings) -> None:
    model = upload(client)
    metadata(client, model)
    job = InferenceJob.objects.get()
    settings.FL_EVENT_ATTEMPTS = 2

    for _ in range(2):
        assert job_claim(job_id=job.pk)
        assert metadata(client, model)["stats_state"] == "pending"
        job_lease_drop(job_id=job.pk)
    sweep()
    failed = metadata(client, model)
    InferenceJob.objects.all().delete()  # as housekeeping does after a day
    again = metadata(client, model)
    work()

    assert failed["stats_state"] == "failed"
    assert failed["stats_error"].startswith("WORKER_LOST")
    assert again["stats_state"] == "pending"
    assert metadata(client, model)["stats_state"] == "done"


def test_a_program_that_is_refused_says_so(client, tmp_path) -> None:
    path = tmp_path / "net.pt2"
    from tests.ai.test_sandbox_exported import edited

    path.write_bytes(exported(Net()))
    edited(path, "models/model.json", lambda d: d.replace(b"aten.linear", b"aten.from_file"))
    model = upload(client, path.read_bytes())

    metadata(client, model)
    work()
    body = metadata(client, model)

    assert (body["stats"], body["stats_state"]) == (None, "failed")
    assert body["stats_error"].startswith("FORBIDDEN_OPERATOR")


def test_a_mean_model_has_none(client) -> None:
    one, two = upload(client), upload(client, scripted(Net()))
    mean = mean_of(client, one, two).json()["model_id"]

    body = metadata(client, mean)

    assert (body["stats"], body["stats_state"]) == (None, "none")


def test_statistics_that_no_model_has_are_deleted_after_a_day(client) -> None:
    model = upload(client, save(weights()))
    metadata(client, model)
    ModelStatistics.objects.update(created_at="2026-01-01T00:00Z")
    assert statistics_delete_unused() == 0

    assert client.delete(f"/api/models/{model}/").status_code == 200

    assert statistics_delete_unused() == 1


def test_nobody_reads_the_job_as_an_answer(client) -> None:
    metadata(client, upload(client))

    assert client.get(f"/api/inference/{InferenceJob.objects.get().pk}/").status_code == 404
