"""Updates of every kind and encoding over HTTP: what they come to, and what is refused by name."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save
from safetensors.torch import load as torch_load
from safetensors.torch import save as torch_save

from fl_client import Context, encodings, fednova
from fl_client.safetensors_io import load as sdk_load
from fl_client.safetensors_io import save as sdk_save
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import Invalid
from fl_server_core.models import Blob, GlobalModel, LocalModel, Task, TrainerEvent
from fl_server_core.storage import local_path, weights_storage
from tests.scenes import Arrays, Scene, person, scene, weights

pytestmark = pytest.mark.django_db
W, B, N = "layer.weight", "layer.bias", "steps"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def post(login, running: Scene, site: str, tensors: Arrays | bytes, **more: Any):
    metadata = more.pop("metadata", None)
    data = tensors if isinstance(tensors, bytes) else save(tensors, metadata)
    fields = {"round": running.now.model.round, "sample_size": 1, **more}
    body = {**fields, "model_file": SimpleUploadedFile("w", data)}
    return login(running.sites[site]).post(
        f"/api/models/{running.training.model_id}/", body, format="multipart"
    )


def refused(answer: Any, code: str, status: int = 422) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.content
    assert not LocalModel.objects.exists()
    body: dict[str, Any] = answer.json()
    return body


def stored(answer: Any) -> Arrays:
    """What is kept of an update: always whole canonical weights."""
    assert answer.status_code == 201, answer.content
    update = LocalModel.objects.get(pk=answer.json()["update_id"])
    with local_path(update.blob) as path:
        return load(path.read_bytes())


def result(running: Scene) -> Arrays:
    process_trainer_task(TrainerEvent.objects.get(state="pending").pk)
    assert running.now.state != "E", running.now.reason
    return running.current()


@pytest.fixture
def running() -> Scene:
    """Two rounds of FedAvg; the model of the second is 2 everywhere."""
    made = scene(skip_model_tests=True, rounds=3)
    made.send("ada", 2.0)
    made.send("grace", 2.0)
    made.work()
    return made


def test_a_delta_is_added_to_the_rounds_model_and_rounded_once(login, running) -> None:
    third = np.full((3, 2), 1 / 3, np.float32)
    delta = {W: third, B: np.zeros(3, np.float32), N: np.array(-5)}

    got = stored(
        post(login, running, "ada", delta, metadata={"kind": "delta", "base_version": "1"})
    )

    np.testing.assert_array_equal(got[W], (2.0 + third.astype(np.float64)).astype(np.float32))
    assert got[B].tolist() == [2.0] * 3
    assert got[N] == -3


def test_a_delta_of_another_version_is_refused(login, running) -> None:
    LocalModel.objects.all().delete()

    answer = post(
        login, running, "ada", weights(0.0), metadata={"kind": "delta", "base_version": "0"}
    )

    assert refused(answer, "BASE_VERSION", 409)["version"] == 1


@pytest.mark.parametrize(("encoding", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_half_the_bytes(login, running, encoding: str, dtype: torch.dtype, kind: str) -> None:
    values = torch.tensor([1.1, -2.7, 0.3])
    sent = {W: torch.full((3, 2), 0.1).to(dtype), B: values.to(dtype), N: torch.tensor(7)}

    got = stored(
        post(login, running, "ada", torch_save(sent, {"kind": kind, "encoding": encoding}))
    )

    start = 2.0 if kind == "delta" else 0.0
    expected = (start + values.to(dtype).double()).float().numpy()
    np.testing.assert_array_equal(got[B], expected)
    assert got[N] == (9 if kind == "delta" else 7)


def test_tensors_that_one_leaves_out_are_the_mean_of_the_others(login, running) -> None:
    """And a tensor that nobody sends stays: the published vector of partial models."""
    one = {W: np.full((3, 2), 8.0, np.float32)}
    other = {W: np.full((3, 2), 4.0, np.float32), N: np.array(9)}

    for site, sent, samples in (("ada", one, 1), ("grace", other, 3)):
        answer = post(login, running, site, sent, sample_size=samples, metadata={"kind": "subset"})
        assert answer.status_code == 201, answer.content

    got = result(running)
    assert got[W].tolist() == [[5.0, 5.0]] * 3
    assert got[B].tolist() == [2.0] * 3
    assert got[N] == 9


def sparse(values: list[float], index: list[int], name: str = B) -> Arrays:
    return {
        name: np.array(values, np.float32),
        f"extra.enc.index.{name}": np.array(index, np.uint32),
    }


def test_numbers_that_nobody_sends_keep_theirs(login, running) -> None:
    answers = [
        post(login, running, "ada", sparse([6.0, 7.0], [0, 1]), metadata={"kind": "sparse"}),
        post(
            login, running, "grace", sparse([9.0], [1]), metadata={"kind": "sparse"}, sample_size=3
        ),
    ]

    assert [answer.status_code for answer in answers] == [201, 201]
    got = result(running)
    assert got[B].tolist() == [6.0, (7.0 + 3 * 9.0) / 4, 2.0]
    assert got[W].tolist() == [[2.0, 2.0]] * 3


def test_a_number_that_nobody_sends_has_no_momentum(login) -> None:
    running = scene(skip_model_tests=True, rounds=2, method="FedAvgM", momentum=0.5)
    for site in ("ada", "grace"):
        running.send(site, 1.0)
    running.work()

    for site in ("ada", "grace"):
        post(login, running, site, sparse([1.0], [0]), metadata={"kind": "sparse"})

    got = result(running)
    assert got[B].tolist() == [1.5, 1.0, 1.0]
    assert got[W].tolist() == [[1.0, 1.0]] * 3


def test_top_k_leaves_out_what_did_not_change_much(login, running) -> None:
    sent = sparse([0.5], [2]) | {W: np.zeros((3, 2), np.float32), N: np.array(0)}

    got = stored(post(login, running, "ada", sent, metadata={"kind": "delta", "encoding": "topk"}))

    assert got[B].tolist() == [2.0, 2.0, 2.5]


def test_int8_is_the_published_affine_code(login, running) -> None:
    sent = {
        W: np.full((3, 2), 94, np.uint8),
        f"extra.enc.scale.{W}": np.array(0.011764705882352941),
        f"extra.enc.zero.{W}": np.array(94, np.uint8),
        B: np.array([0, 146, 255], np.uint8),
        f"extra.enc.scale.{B}": np.array(0.011764705882352941),
        f"extra.enc.zero.{B}": np.array(94, np.uint8),
        N: np.array(3),
    }

    got = stored(post(login, running, "ada", sent, metadata={"encoding": "int8"}))

    expected = [-1.1058823529411765, 0.611764705882353, 1.8941176470588235]
    np.testing.assert_array_equal(got[B], np.array(expected, np.float32))
    assert got[W].tolist() == [[0.0, 0.0]] * 3


def test_qsgd_is_the_published_code(login, running) -> None:
    sent = {
        B: np.array([2, -2, 3], np.int8),
        f"extra.enc.norm.{B}": np.array(1.5620499351813308),
        W: np.zeros((3, 2), np.float32),
        N: np.array(0),
    }
    metadata = {"kind": "delta", "encoding": "qsgd", "levels": "4"}

    got = stored(post(login, running, "ada", sent, metadata=metadata))

    decoded = np.array([0.7810249675906654, -0.7810249675906654, 1.1715374513859982])
    np.testing.assert_array_equal(got[B], (2 + decoded).astype(np.float32))


BASE = weights(1.0)
SCAFFOLD = {**BASE, f"extra.scaffold.dc.{B}": np.ones(3, np.float32)}


def test_numbers_are_checked(login) -> None:
    running = scene(method="qFedAvg")

    def sent(value: Any) -> Any:
        return post(login, running, "ada", {**BASE, "extra.qfedavg.loss": np.array(value)})

    refused(sent(-1.0), "EXTRA_RANGE")
    refused(sent([1.0, 2.0]), "EXTRA_SHAPE")
    refused(sent(3), "EXTRA_SHAPE")
    assert sent([[2.5]]).status_code == 201
    assert LocalModel.objects.get().numbers == {"qfedavg.loss": 2.5}


def test_steps_are_needed_where_they_count(login) -> None:
    running = scene(method="FedNova")

    refused(post(login, running, "ada", BASE), "NUM_STEPS_MISSING")

    assert post(login, running, "ada", BASE, num_steps=4, base_version=0).status_code == 201
    update = LocalModel.objects.get()
    assert (update.num_steps, update.base_version) == (4, 0)


RHO, DUAL = "extra.admm.rho", f"extra.admm.dual.{B}"


@pytest.mark.parametrize(
    ("options", "extras", "said"),
    [
        ({"method": "FedNova"}, {"extra.fednova.norm": 1e-9}, "'extra.fednova.norm'|1 to 400"),
        ({"method": "FedNova"}, {"extra.fednova.norm": 1e20}, "'extra.fednova.norm'|1 to 400"),
        ({"method": "FedNova"}, {"extra.fednova.norm": 410.0}, "num_steps|local steps"),
        ({"method": "FedNova", "momentum": 0.999}, {"extra.fednova.norm": 4100.0}, "1 to 4000"),
        ({"method": "FedNova", "max_steps": 3}, {}, "num_steps is 4|max_steps is 3"),
        ({"method": "ICEADMM"}, {RHO: 1e308}, f"{RHO}|at most 500000"),
        ({"method": "ICEADMM"}, {RHO: 1e-9}, f"{RHO}|at least 0.5"),
        ({"method": "ICEADMM"}, {DUAL: np.full(3, 3e38)}, f"{DUAL}|at most 5e+32"),
        ({"method": "SCAFFOLD"}, {f"extra.scaffold.dc.{B}": np.full(3, -3e38)}, "at least -1e+30"),
        ({"method": "qFedAvg"}, {"extra.qfedavg.loss": 1e300}, "qfedavg.loss|at most 1e+30"),
        ({"method": "FedProx", "adaptive": True}, {"extra.prox.loss": -1e308}, "prox.loss|-1e+30"),
        (
            {"method": "FedDGGA"},
            {"extra.feddgga.received": 1.0, "extra.feddgga.trained": -1e308},
            "feddgga.trained|-1e+30",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_would_end_the_training_is_refused_alone(
    login, options, extras, said
) -> None:
    running = scene(**options)
    if options["method"] == "ICEADMM":
        extras = {DUAL: np.ones(3), **extras}
    sent = {**BASE, **{name: np.asarray(value) for name, value in extras.items()}}

    answer = refused(post(login, running, "ada", sent, num_steps=4), "EXTRA_RANGE")

    assert all(part in answer["detail"] for part in said.split("|")), answer


@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ({}, {"extra.fednova.norm": 1.0}),
        ({}, {"extra.fednova.norm": np.float16(4.0)}),
        ({}, {"extra.fednova.norm": fednova.norm(4, momentum=0.9)}),  # of its own
        ({}, {"extra.fednova.norm": fednova.norm(4, lr=0.1, mu=1.0)}),
    ],
)
def test_the_norms_of_the_paper_are_taken(login, options, extras) -> None:
    running = scene(method="FedNova", **options)
    sent = {**BASE, **{name: np.asarray(value) for name, value in extras.items()}}

    answer = post(login, running, "ada", sent, num_steps=4)

    assert answer.status_code == 201, answer.content


def test_masks_are_zeros_and_ones(login) -> None:
    running = scene(method="FedPM")

    refused(post(login, running, "ada", weights(0.5)), "NOT_A_MASK")


def test_the_same_update_with_other_extras_is_another_one(login) -> None:
    running = scene(method="SCAFFOLD")
    answers = [
        post(
            login, running, "ada", {**BASE, f"extra.scaffold.dc.{B}": np.full(3, value, np.float32)}
        )
        for value in (1.0, 1.0, 2.0)
    ]

    assert [answer.status_code for answer in answers] == [201, 200, 409]
    assert answers[0].json()["update_id"] == answers[1].json()["update_id"]
    assert answers[2].json()["code"] == "DUPLICATE"


def test_stored_weights_have_the_models_header_whatever_came_with_them(login) -> None:
    running = scene(method="SCAFFOLD")

    post(login, running, "ada", SCAFFOLD)

    update = LocalModel.objects.get()
    with local_path(update.blob) as path, local_path(running.now.model.weights.blob) as model:
        one, other = path.read_bytes(), model.read_bytes()
    length = int.from_bytes(other[:8], "little") + 8
    assert one[:length] == other[:length]
    with local_path(update.extras) as path:
        assert load(path.read_bytes())["scaffold.dc.0"].tolist() == [1.0] * 3 + [0.0] * 6


def test_clients_get_the_control_variate_with_their_next_task(login) -> None:
    running = scene(method="SCAFFOLD", skip_model_tests=True, rounds=2)
    client = login(running.sites["ada"])
    assert client.get("/api/tasks/").json()["task"]["extras"] is None
    assert client.get(f"/api/models/{running.training.model_id}/extras/").status_code == 204
    for site in ("ada", "grace"):
        post(login, running, site, SCAFFOLD)

    result(running)

    extras = client.get("/api/tasks/").json()["task"]["extras"]
    answer = client.get(extras["url"])
    data = b"".join(answer.streaming_content)
    assert answer["ETag"] == f'"{extras["sha256"]}"'
    assert len(data) == extras["bytes"]
    got = load(data)
    assert got[f"extra.scaffold.c.{B}"].tolist() == [1.0] * 3
    assert got[f"extra.scaffold.c.{W}"].shape == (3, 2)


def test_a_name_that_the_model_has_itself_can_be_no_extra(login) -> None:
    running = scene(started=False)
    client = login(running.actor)
    own = {"w": np.ones(2), "extra.scaffold.dc.w": np.ones(2)}
    body = {"name": "m", "description": "", "model_file": SimpleUploadedFile("w", save(own))}
    model = client.post("/api/models/", body, format="multipart").json()["model_id"]

    def create(method: str) -> Any:
        fields = {"model_id": model, "target_num_updates": 1, "metric_names": []}
        return client.post(
            "/api/trainings/", {**fields, "aggregation_method": method}, format="json"
        )

    assert create("SCAFFOLD").json()["code"] == "EXTRA_COLLISION"
    assert create("FedAvg").status_code == 201


def test_excluded_tensors_stay_with_the_sites(login) -> None:
    sites = ("ada", "grace", "alan")
    running = scene(*sites, skip_model_tests=True, rounds=2, method="Krum", f=0, exclude=["*.bias"])
    client = login(running.sites["ada"])

    config = client.get("/api/tasks/").json()["task"]["config"]
    whole = post(login, running, "ada", weights(3.0))
    part = {name: value for name, value in weights(3.0).items() if name != B}

    assert config["exclude"] == ["*.bias"]
    assert refused(whole, "TENSOR_EXCLUDED")["tensor"] == B
    assert post(login, running, "ada", part).status_code == 201
    assert stored_again(running) == [0.0] * 3


def stored_again(running: Scene) -> list[float]:
    with local_path(LocalModel.objects.get().blob) as path:
        values: list[float] = load(path.read_bytes())[B].tolist()
    return values


def test_only_the_included_tensors_are_trained(login) -> None:
    running = scene(skip_model_tests=True, rounds=1, include=["layer.*"], exclude=["*.bias"])

    for site, value in (("ada", 1.0), ("grace", 3.0)):
        answer = post(login, running, site, {W: weights(value)[W]})
        assert answer.status_code == 201, answer.content

    got = result(running)
    assert got[W].tolist() == [[2.0, 2.0]] * 3
    assert (got[B].tolist(), int(got[N])) == ([0.0] * 3, 0)


@pytest.mark.parametrize(
    "options", [{"include": ["head.*"]}, {"exclude": ["bn*"]}, {"exclude": ["*"]}], ids=str
)
def test_patterns_that_fit_nothing_or_leave_nothing_are_refused(login, options) -> None:
    running = scene(started=False)
    fields = {
        "model_id": str(running.model.pk),
        "target_num_updates": 1,
        "metric_names": [],
        "aggregation_method": "FedAvg",
        "options": options,
    }

    answer = login(running.actor).post("/api/trainings/", fields, format="json")

    assert answer.status_code == 400
    assert answer.json()["errors"][0]["pointer"] == f"/options/{next(iter(options))}"


def test_rules_that_weigh_whole_updates_need_whole_updates(login) -> None:
    running = scene("ada", "grace", "alan", method="Krum", f=0)

    refused(
        post(login, running, "ada", {W: BASE[W]}, metadata={"kind": "subset"}),
        "PARTIAL_NOT_TAKEN",
    )


def test_a_gradient_may_leave_tensors_out(login) -> None:
    running = scene("ada", method="FedSGD", lr=0.5, rounds=1, skip_model_tests=True)
    gradient = {B: np.array([1.0, 2.0, 3.0], np.float32)}
    meta = json.dumps({"num_examples": 1, "num_steps": 1, "base_version": 0})
    data = save(gradient | {W: np.zeros((3, 2), np.float32)}, {"kind": "gradient"})
    body = {"meta": meta, "model_file": SimpleUploadedFile("g", data)}
    task = running.task("ada")

    answer = login(running.sites["ada"]).post(
        f"/api/tasks/{task.pk}/result/", body, format="multipart"
    )

    assert answer.status_code == 201, answer.content
    got = result(running)
    assert got[B].tolist() == [-0.5, -1.0, -1.5]
    assert got[W].tolist() == [[0.0, 0.0]] * 3


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_sdk_encodes_is_what_the_server_reads(login, dtype, tmp_path) -> None:
    generator = torch.Generator().manual_seed(3)
    start = {
        W: torch.full((3, 2), 2.0).to(dtype),
        "q": torch.ones(2).to(FLOAT8[0]),
        N: torch.tensor(0),
    }
    end = {
        W: (start[W] + 1e-2 * torch.randn(3, 2, generator=generator)).to(dtype),
        "q": torch.zeros(2).to(FLOAT8[0]),
        N: torch.tensor(5),
    }
    own = Own(login, "FedAvg", start, "grace")
    rng = np.random.default_rng(3)
    context = Context({"round": 0}, lambda _: {}, folder=tmp_path / "memory")
    with local_path(GlobalModel.objects.get(pk=own.model).weights.blob) as path:
        handed_out = sdk_load(path)
    sdk_save(tmp_path / "end", end)
    ended = sdk_load(tmp_path / "end")
    change = encodings.delta(handed_out, ended)
    error = float((end[W].double() - start[W].double()).abs().max())
    last = torch.finfo(dtype).eps * 2  # of the model's own numbers
    coded = {
        0.0: change,
        error / 1024: encodings.fp16(change),
        error / 250: encodings.bf16(change),
        error / 127: encodings.int8(change),
        error: encodings.topk(handed_out, ended, 2, context),
        3 * error: encodings.qsgd(change, 7, rng),
    }

    for most, one in coded.items():
        path = tmp_path / "update"
        sdk_save(path, one.weights, one.metadata)
        answer = own.post(path.read_bytes())
        assert answer.status_code == 201, (one.metadata, answer.content)
        with local_path(LocalModel.objects.get().blob) as at:
            got = torch_load(at.read_bytes())
        assert (got[W].double() - end[W].double()).abs().max() <= most + last, one.metadata
        assert got["q"].float().tolist() == [0.0, 0.0]
        assert got[N] == 5
        LocalModel.objects.all().delete()
        Task.objects.update(state="open")


def test_a_delta_sent_again_after_its_round_gets_the_same_receipt(login, running) -> None:
    metadata = {"kind": "delta"}
    first = post(login, running, "ada", weights(0.5), metadata=metadata)
    post(login, running, "grace", weights(0.5), metadata=metadata)
    result(running)

    again = post(login, running, "ada", weights(0.5), metadata=metadata, round=1)

    assert (again.status_code, again.json()["update_id"]) == (200, first.json()["update_id"])


def test_extras_in_an_npz_are_the_same(login) -> None:
    running = scene(method="SCAFFOLD")
    archive = io.BytesIO()
    np.savez(archive, **SCAFFOLD)

    answers = [
        post(login, running, "ada", archive.getvalue()),
        post(login, running, "ada", SCAFFOLD),
    ]

    assert [answer.status_code for answer in answers] == [201, 200]


def test_the_files_beside_an_update_go_with_it(login) -> None:
    running = scene(method="SCAFFOLD", skip_model_tests=True)
    for site in ("ada", "grace"):
        post(login, running, site, SCAFFOLD)
    kept = [
        blob.name for update in LocalModel.objects.all() for blob in (update.blob, update.extras)
    ]

    result(running)

    assert not Blob.objects.filter(name__in=kept).exists()
    assert not any(weights_storage().exists(name) for name in kept)


class Own:
    """A started training of a model of one's own, in which ada sends."""

    def __init__(self, login, method: str, start: dict[str, torch.Tensor], *others: str) -> None:
        self.running = scene(started=False)
        self.actor = login(self.running.actor)
        file = SimpleUploadedFile("w", torch_save(start))
        body = {"name": "m", "description": "", "model_file": file}
        made = self.actor.post("/api/models/", body, format="multipart")
        self.model = made.json()["model_id"]
        fields = {
            "model_id": self.model,
            "target_num_updates": 2,
            "metric_names": [],
            "aggregation_method": method,
            "clients": [str(self.running.sites[name].pk) for name in ("ada", *others)],
            "options": {"skip_model_tests": True},
        }
        training = self.actor.post("/api/trainings/", fields, format="json").json()["training_id"]
        self.actor.post(f"/api/trainings/{training}/start/")
        self.site = login(self.running.sites["ada"])

    def send(self, tensors: dict[str, torch.Tensor]) -> Any:
        return self.post(torch_save(tensors))

    def post(self, data: bytes) -> Any:
        file = SimpleUploadedFile("w", data)
        body = {"round": 0, "sample_size": 1, "model_file": file}
        return self.site.post(f"/api/models/{self.model}/", body, format="multipart")

    def result(self) -> dict[str, torch.Tensor]:
        process_trainer_task(TrainerEvent.objects.get(state="pending").pk)
        answer = self.actor.get(f"/api/models/{self.model}/")
        return torch_load(b"".join(answer.streaming_content))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_models_have_float32_variates(login, dtype) -> None:
    own = Own(login, "SCAFFOLD", {"w": torch.ones(3).to(dtype), "v": torch.ones(2)})
    sent = {
        "w": torch.full((3,), 2.0).to(dtype),
        "v": torch.ones(2),
        "extra.scaffold.dc.w": torch.tensor([0.1, 0.2, 0.3]),
    }

    assert own.send(sent).status_code == 201
    own.result()

    extras = own.site.get("/api/tasks/").json()["task"]["extras"]
    got = load(b"".join(own.site.get(extras["url"]).streaming_content))
    assert got["extra.scaffold.c.w"].tolist() == np.array([0.1, 0.2, 0.3], np.float32).tolist()
    assert got["extra.scaffold.c.v"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_float8_tensor_without_a_gradient_stays(login, dtype) -> None:
    frozen = torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    own = Own(login, "FedSGD", {"q": frozen, "w": torch.ones(2)})

    assert own.send({"w": torch.tensor([1.0, 2.0])}).status_code == 201

    got = own.result()
    assert torch.equal(got["q"].float(), frozen.float())
    assert got["w"].tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_masks_are_zeros_and_ones_too(login, dtype) -> None:
    own = Own(login, "FedPM", {"q": torch.full((3,), 0.5).to(dtype)})

    for bad in (0.5, 2.0, -1.0):
        answer = own.send({"q": torch.tensor([1.0, bad, 0.0]).to(dtype)})
        assert (answer.status_code, answer.json()["code"]) == (422, "NOT_A_MASK")

    mask = torch.tensor([1.0, 0.0, -0.0]).to(dtype)
    assert own.send({"q": mask}).status_code == 201
    assert own.result()["q"].float().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["SCAFFOLD", "FedSGD", "FedNova", "FedPM", "qFedAvg", "FLTrust"])
def test_no_chains_of_what_is_no_model_or_must_be_somebodys(method: str) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(started=False, method=method, daisy_chain_period=2)

    faults = refusal.value.data["errors"]
    assert [fault["pointer"] for fault in faults] == ["/options/daisy_chain_period"]


@pytest.mark.parametrize("method", ["FedSGD", "FedPM"])
def test_no_ensembles_of_what_is_no_model(method: str) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(started=False, method=method, uncertainty="ENSEMBLE")

    assert refusal.value.error_code == "NO_MODELS"


@pytest.mark.parametrize(
    "body",
    [b"--b\r\nFalse--b--", b"{}", b"--c\r\n\r\n1\r\n--c--\r\n", b"--b\r\n\r\nno name\r\n--b--"],
)
def test_a_multipart_body_without_a_named_part_is_not_an_empty_form(login, body: bytes) -> None:
    client, path = login(person("ada", actor=True)), "/api/users/myself/tokens/"
    kind = "multipart/form-data; boundary=b"

    answer = client.post(path, body, content_type=kind)
    empty = client.post(path, b"--b--\r\n", content_type=kind)

    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID"), answer.content
    assert empty.status_code == 201
