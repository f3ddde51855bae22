"""Asking models over HTTP: a real child in its sandbox answers what torch itself does."""

import base64
import io
import json
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save
from torch import Tensor, nn

from fl_server_ai.dispatch import INFERENCE, register_sender
from fl_server_ai.inference import pool
from fl_server_ai.inference.tasks import run_inference
from fl_server_ai.services.moments import moments_submit
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_ai.uncertainty.swag import draw_weights
from fl_server_core.exceptions import Unusable
from fl_server_core.models import Blob, GlobalModel, InferenceJob, LocalModel, User
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.inference import job_claim, job_lease_drop, jobs_delete_old
from fl_server_core.storage import DurableStorage
from tests.scenes import Scene, person, staged

pytestmark = pytest.mark.django_db
OWNER = uuid.UUID(int=7)  # a warm child belongs to one user: the same in all tests
INPUT = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -1.0, 3.0]]
X = torch.tensor(INPUT)


def network() -> nn.Module:
    """Four numbers to three logits, with dropout."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).eval()


def scripted(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


NETWORK = scripted(network())


class Weighted(nn.Module):
    """A model has weights, if only one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Same(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    pool.close()


@pytest.fixture
def owner() -> User:
    return person("owner", id=OWNER, actor=True)


@pytest.fixture
def client(login, owner: User) -> Any:
    return login(owner)


def upload(client: Any, data: bytes = NETWORK, **fields: Any) -> str:
    body = {"name": "net", "description": "-", "model_file": SimpleUploadedFile("m", data)}
    answer = client.post("/api/models/", {**body, **fields}, format="multipart")
    assert answer.status_code == 201, answer.json()
    return str(answer.json()["model_id"])


def ask(client: Any, model: str, given: Any = INPUT, **fields: Any) -> Any:
    """The answer, after a worker has had the job; the refusal of the POST if it is one."""
    body = {"model_id": model, "model_input": given, **fields}
    file = isinstance(given, SimpleUploadedFile)
    posted = client.post("/api/inference/", body, format="multipart" if file else "json")
    if posted.status_code != 202:
        return posted
    run_inference(posted.json()["job_id"])
    return client.get(posted.json()["url"])


def options(**values: Any) -> dict[str, Any]:
    return {"uncertainty": values}


def test_without_a_method_the_answer_is_the_index_of_the_largest_output(client) -> None:
    answer = ask(client, upload(client))

    assert answer.status_code == 200, answer.json()
    body = answer.json()
    assert body["inference"] == network()(X).argmax(1).tolist()
    assert (body["uncertainty"], body["state"]) == ({}, "done")


def test_a_regression_without_a_method_is_the_outputs_bit_for_bit(client) -> None:
    answer = ask(client, upload(client), options=options(task="regression"))

    np.testing.assert_array_equal(
        np.array(answer.json()["inference"], np.float32), network()(X).detach().numpy()
    )


def test_dropout_draws_are_as_many_as_asked_and_repeatable(client) -> None:
    model = upload(client)
    how = {"uncertainty_method": "MC_DROPOUT", "options": options(N=50, seed=4, output="logits")}

    one, two = (ask(client, model, **how).json() for _ in range(2))
    other = ask(
        client,
        model,
        uncertainty_method="MC_DROPOUT",
        options=options(N=50, seed=5, output="logits"),
    )

    assert one["inference"] == two["inference"] != other.json()["inference"]
    found = {name: np.array(value) for name, value in one["uncertainty"].items()}
    assert set(found) == {
        "variance", "std", "predictive_entropy", "expected_entropy", "mutual_info",
    }  # fmt: skip
    np.testing.assert_allclose(np.sum(one["inference"], axis=1), 1)
    probs = np.array(one["inference"])
    np.testing.assert_allclose(found["predictive_entropy"], -(probs * np.log(probs)).sum(1))
    np.testing.assert_allclose(
        found["mutual_info"], found["predictive_entropy"] - found["expected_entropy"]
    )
    assert (found["variance"] > 0).all()


def test_swag_draws_are_those_of_the_moments(client, owner: User) -> None:
    running = swag_training(owner, upload(client))
    how = {"N": 6, "seed": 9, "task": "regression"}

    body = ask(client, str(running.training.model_id), options=options(**how)).json()
    plain = ask(client, str(running.training.model_id), uncertainty_method="NONE").json()

    draws = torch.stack([drawn_network(running, 9, draw)(X) for draw in range(6)]).double()
    np.testing.assert_allclose(body["inference"], draws.mean(0).detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        body["uncertainty"]["variance"], draws.var(0).detach(), rtol=1e-4, atol=1e-7
    )
    assert set(body["uncertainty"]) >= {"quantile_0.05", "quantile_0.95"}
    assert plain["inference"] == drawn_network(running, 9, None)(X).argmax(1).tolist()


def swag_training(owner: User, model: str) -> Scene:
    """One round with one site, which sends the network again and moments of it."""
    ada = person("ada", client=True)
    training = training_create(
        actor=owner, model=GlobalModel.objects.get(pk=model), target_num_updates=1,
        aggregation_method="FedAvg", uncertainty_method="SWAG", options={"skip_model_tests": True},
        clients=[ada.pk],
    )  # fmt: skip
    training_start(training=training, user=owner)
    running = Scene(owner, {"ada": ada}, training.model, training)
    send(running, "ada", NETWORK)
    running.work()
    send_moments(running, "ada")
    running.work()
    assert running.now.state == "C"
    return running


def send(running: Scene, site: str, data: bytes) -> LocalModel:
    return update_submit(
        model_id=running.training.model_id, owner=running.sites[site], round=0, sample_size=1,
        file=staged(data), sha256=None, metrics={},
    ).update  # fmt: skip


def moments() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    state = {name: tensor.double().numpy() for name, tensor in network().state_dict().items()}
    return state, {name: array**2 + 0.01 for name, array in state.items()}


def send_moments(running: Scene, site: str) -> None:
    first, second = moments()
    moments_submit(
        model_id=running.training.model_id, owner=running.sites[site], round=1, sample_size=1,
        first=staged(save(first)), second=staged(save(second)),
    )  # fmt: skip


def drawn_network(running: Scene, seed: int, draw: int | None) -> nn.Module:
    module = network()
    if draw is not None:
        first, second = ({n: torch.from_numpy(a) for n, a in half.items()} for half in moments())
        weights = dict(draw_weights(first, second, seed=seed, draw=draw))
        module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return module


def test_the_method_of_the_training_counts_unless_the_request_names_one(
    client, owner: User
) -> None:
    training = training_create(
        actor=owner, model=GlobalModel.objects.get(pk=upload(client)), target_num_updates=1,
        aggregation_method="FedAvg", uncertainty_method="MC_DROPOUT", options=options(N=3, seed=1),
    )  # fmt: skip
    model = str(training.model_id)

    usual = ask(client, model)
    named = ask(client, model, uncertainty_method="NONE")

    assert "variance" in usual.json()["uncertainty"]
    assert named.json()["uncertainty"] == {}
    job = InferenceJob.objects.order_by("id").first()
    assert job is not None
    assert (job.method, job.options["N"], job.options["seed"]) == ("MC_DROPOUT", 3, 1)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "torch", "base64"])
def test_an_input_may_be_a_file_of_one_tensor(client, kind: str) -> None:
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, x=X.numpy())
    elif kind == "torch":
        torch.save(X, buffer)
    else:
        buffer.write(save({"anything": X.numpy()}))
    data = buffer.getvalue()
    given = base64.b64encode(data).decode() if kind == "base64" else SimpleUploadedFile("x", data)

    answer = ask(client, upload(client), given, return_format="json")

    assert answer.status_code == 200, answer.json()
    assert answer.json()["inference"] == network()(X).argmax(1).tolist()


def test_binary_answers_are_safetensors_or_npz(client) -> None:
    model, file = upload(client), save({"x": X.numpy()})
    how = {"uncertainty_method": "MC_DROPOUT"}

    binary = ask(client, model, SimpleUploadedFile("x", file), **how)
    npz = ask(client, model, return_format="npz", **how)
    listed = ask(client, model, **how).json()

    tensors = load(binary.content)
    assert set(tensors) == {"inference", "uncertainty.variance", "uncertainty.std"}
    assert tensors["inference"].tolist() == listed["inference"]
    with np.load(io.BytesIO(npz.content)) as arrays:
        assert arrays["uncertainty.std"].tolist() == listed["uncertainty"]["std"]


def test_large_inputs_and_answers_are_files_that_go_with_the_job(client) -> None:
    model = upload(client, scripted(Same()), input_shape=["None", 100])
    numbers = np.random.default_rng(0).standard_normal((500, 100)).astype(np.float32)
    blobs = Blob.objects.filter(doomed_at=None).count()

    answer = ask(
        client,
        model,
        SimpleUploadedFile("x", save({"x": numbers})),
        options=json.dumps(options(task="regression")),
    )

    np.testing.assert_array_equal(load(answer.content)["inference"], numbers)
    assert Blob.objects.filter(doomed_at=None).count() == blobs + 1
    InferenceJob.objects.update(created_at="2026-01-01T00:00Z")
    jobs_delete_old()
    assert blobs_doom_unreferenced() == 1
    assert not InferenceJob.objects.exists()


@pytest.mark.parametrize(
    ("given", "fields", "status", "code", "said"),
    [
        ([INPUT], {}, 400, "INPUT_SHAPE", "3 dimensions instead of 2"),
        ([[1.0, 2.0]], {}, 400, "INPUT_SHAPE", "dimension 1 is 2 instead of 4"),
        ([], {}, 400, "INPUT_SHAPE", "empty"),
        ([[1.0], [1.0, 2.0]], {}, 400, "BAD_INPUT", "same length"),
        ([["a", 1.0]], {}, 400, "BAD_INPUT", "numbers only"),
        ([[None, 1.0]], {}, 400, "BAD_INPUT", "numbers only"),
        ([[1e300] * 4], {}, 400, "BAD_INPUT", "float32"),
        ([[1.5] * 4], {"dtype": "int64"}, 400, "BAD_INPUT", "int64"),
        ([[300] * 4], {"dtype": "uint8"}, 400, "BAD_INPUT", "uint8"),
        ("not base64!", {}, 400, "BAD_INPUT", "base64"),
        ("AAAA", {}, 415, "UNKNOWN_CONTAINER", "container"),
        ({"a": 1}, {}, 400, "INVALID", "nested lists"),
        ([[2**70, 1]], {}, 400, "BAD_INPUT", "out of range"),
        (INPUT, {"dtype": "float8"}, 400, "INVALID", "dtype"),
        (INPUT, {"return_format": "pickle"}, 400, "INVALID", "return_format"),
        (INPUT, {"uncertainty_method": "GUESS"}, 400, "UNKNOWN_METHOD", "MC_DROPOUT"),
        (INPUT, {"uncertainty_method": "ENSEMBLE"}, 422, "NO_MEMBERS", "type=MEAN"),
        (INPUT, {"uncertainty_method": "SWAG"}, 422, "NO_MOMENTS", "NONE"),
        (INPUT, {"options": options(N=0)}, 400, "BAD_OPTION", "/options/uncertainty/N"),
        (INPUT, {"options": {"N": 3}}, 400, "BAD_OPTION", "/options/N"),
        (INPUT, {"options": {"uncertainty": 3}}, 400, "BAD_OPTION", "object"),
        (INPUT, {"model_id": str(uuid.uuid4())}, 404, "NOT_FOUND", ""),
        (INPUT, {"uncertainty": "SWAG"}, 200, "", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_runs(
    client, given: Any, fields: dict[str, Any], status: int, code: str, said: str
) -> None:
    model = upload(client, input_shape=["None", 4])

    answer = ask(client, model, given, **fields)

    assert answer.status_code == status, answer.json()
    assert answer.json().get("code", "") == code
    assert said in answer.json().get("detail", "")
    assert InferenceJob.objects.exists() == (status == 200)


def test_files_that_are_no_input_are_refused(client, settings) -> None:
    model = upload(client)
    two = save({"a": X.numpy(), "b": X.numpy()})
    large = save({"a": np.zeros(3000, np.float32)})
    settings.FL_MAX_INPUT_BYTES = 10_000
    announced = client.generic("POST", "/api/inference/", b" " * 2_000_000)
    assert announced.status_code == 413

    answers = [
        ask(client, model, SimpleUploadedFile("x", data), **fields)
        for data, fields in ((two, {}), (two, {"dtype": "int8"}), (large, {}), (b"", {}))
    ]

    assert [(a.status_code, a.json()["code"]) for a in answers] == [
        (400, "BAD_INPUT"), (400, "INVALID"), (413, "TOO_LARGE"), (415, "UNKNOWN_CONTAINER"),
    ]  # fmt: skip
    assert not InferenceJob.objects.exists()


def test_a_model_without_a_program_says_how_to_upload_one(client) -> None:
    state = io.BytesIO()
    torch.save(network().state_dict(), state)

    answers = [
        ask(client, upload(client, data)) for data in (save({"w": X.numpy()}), state.getvalue())
    ]

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (422, "NOT_EXECUTABLE")
        assert "torch.jit.script" in answer.json()["detail"]
    assert "pickle" in answers[1].json()["detail"]


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("/etc/passwd", False, 4)  # noqa: FBT003


def test_a_program_that_reads_files_is_refused_when_it_is_uploaded(client) -> None:
    body = {"name": "n", "description": "-"}
    body["model_file"] = SimpleUploadedFile("m", scripted(Reads()))

    answer = client.post("/api/models/", body, format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (422, "FORBIDDEN_OPERATOR")
    assert not GlobalModel.objects.exists()


def test_outsiders_see_neither_model_nor_job(client, login) -> None:
    model = upload(client)
    ask(client, model)
    job = InferenceJob.objects.get()
    stranger = login(person("stranger", actor=True))

    assert ask(stranger, model).status_code == 404
    assert stranger.get(f"/api/inference/{job.pk}/").status_code == 404
    assert client.get(f"/api/inference/{job.pk}/?format=xml").json()["code"] == "BAD_FORMAT"


def test_local_models_are_asked_by_those_who_see_them(client, login, owner: User) -> None:
    ada, grace = person("ada", client=True), person("grace", client=True)
    training = training_create(
        actor=owner, model=GlobalModel.objects.get(pk=upload(client)), target_num_updates=1,
        aggregation_method="FedAvg", options={}, clients=[ada.pk, grace.pk],
    )  # fmt: skip
    training_start(training=training, user=owner)
    running = Scene(owner, {"ada": ada, "grace": grace}, training.model, training)
    other = network()
    with torch.no_grad():
        other[3].bias += torch.tensor([0.0, 100.0, 0.0])
    local = send(running, "ada", scripted(other))

    answer = ask(client, str(local.pk))

    assert answer.json()["inference"] == [1, 1]
    assert ask(login(grace), str(local.pk)).status_code == 404
    swag = ask(client, str(local.pk), uncertainty_method="SWAG")
    assert swag.json()["code"] == "NO_MOMENTS"
    LocalModel.objects.update(blob=None)
    assert ask(client, str(local.pk)).json()["code"] == "FILE_DELETED"


def mean_of(client: Any, *members: str, **fields: Any) -> Any:
    body = {"name": "mean", "description": "-", "type": "MEAN", "models": members, **fields}
    return client.post("/api/models/", body)


def other_network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


@pytest.mark.parametrize("weights", [[], [3.0, 1.0]])
def test_an_ensemble_is_the_weighted_mixture_of_its_members(client, weights: list[float]) -> None:
    one, two = upload(client), upload(client, scripted(other_network()))
    made = mean_of(client, one, two, **({"weights": weights} if weights else {}))
    assert made.status_code == 201, made.json()

    body = ask(client, made.json()["model_id"], options=options(output="logits")).json()

    probs = torch.stack([m(X).softmax(1).double() for m in (network(), other_network())]).detach()
    shares = torch.tensor(weights or [1.0, 1.0], dtype=torch.float64)
    mixture = (probs * (shares / shares.sum())[:, None, None]).sum(0)
    np.testing.assert_allclose(body["inference"], mixture, rtol=1e-6)
    entropy = -(mixture * mixture.log()).sum(1)
    np.testing.assert_allclose(body["uncertainty"]["predictive_entropy"], entropy, rtol=1e-6)


def test_an_ensemble_is_made_of_models_that_one_sees_and_that_can_be_run(
    client, login, owner: User
) -> None:
    one, weights = upload(client), upload(client, save({"w": X.numpy()}))
    mean = mean_of(client, one).json()["model_id"]
    stranger = login(person("stranger", actor=True))

    refusals = [
        mean_of(client),
        mean_of(client, one, one),
        mean_of(client, one, weights=[1.0, 2.0]),
        mean_of(client, one, weights=[0.0]),
        mean_of(client, mean),
        mean_of(client, weights),
        mean_of(stranger, one),
        mean_of(login(person("site", client=True)), one),
        ask(client, mean, uncertainty_method="NONE"),
        client.delete(f"/api/models/{one}/"),
    ]

    assert [(r.status_code, r.json()["code"]) for r in refusals] == [
        *[(400, "BAD_MEMBERS")] * 5, (422, "NOT_EXECUTABLE"), (404, "NOT_FOUND"),
        (403, "NOT_PERMITTED"), (422, "MEMBERS_ONLY"), (409, "MODEL_IN_USE"),
    ]  # fmt: skip
    with pytest.raises(Unusable, match="members"):
        training_create(
            actor=owner, model=GlobalModel.objects.get(pk=mean), target_num_updates=1,
            aggregation_method="FedAvg", options={},
        )  # fmt: skip
    assert client.get(f"/api/models/{mean}/metadata/").json()["type"] == "MEAN"
    assert load(b"".join(client.get(f"/api/models/{mean}/").streaming_content)) == {}
    assert client.delete(f"/api/models/{mean}/").status_code == 200
    assert client.delete(f"/api/models/{one}/").status_code == 200


class Loops(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        while bool((x == x).all()):
            x = x * 1.0
        return x


def test_a_program_that_never_ends_is_ended_and_the_next_is_answered(client, settings) -> None:
    settings.FL_INFERENCE_SECONDS = 1
    hostile, honest = upload(client, scripted(Loops())), upload(client)

    refused = ask(client, hostile)
    answered = ask(client, honest)

    assert (refused.status_code, refused.json()["code"]) == (422, "SANDBOX_TIMEOUT")
    assert answered.status_code == 200


class Divides(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0.0


@pytest.mark.parametrize("method", ["NONE", "MC_DROPOUT"])
def test_no_answer_holds_nan(client, method: str) -> None:
    model = upload(client, scripted(nn.Sequential(nn.Dropout(0.5), Divides())))

    answer = ask(
        client,
        model,
        [[0.0, 1.0]],
        uncertainty_method=method,
        options=options(task="regression"),
    )

    assert (answer.status_code, answer.json()["code"]) == (422, "NON_FINITE_OUTPUT")


def test_a_model_without_dropout_says_so(client) -> None:
    model = upload(client, scripted(nn.Sequential(nn.Linear(4, 2))))

    answer = ask(client, model, uncertainty_method="MC_DROPOUT")

    assert (answer.status_code, answer.json()["code"]) == (422, "NO_DROPOUT")
    assert "Dropout" in answer.json()["detail"]


def test_who_asks_again_is_told_to_wait_until_there_is_an_answer(client) -> None:
    body = {"model_id": upload(client), "model_input": INPUT}

    posted = client.post("/api/v1/inference/", body)
    pending = client.get(posted.json()["url"])
    run_inference(posted.json()["job_id"])
    run_inference(posted.json()["job_id"])  # delivered twice
    done = client.get(posted["Location"])

    assert posted.status_code == pending.status_code == 202
    assert posted.json()["url"] == f"/api/v1/inference/{posted.json()['job_id']}/"
    assert (posted.json()["state"], done.json()["state"]) == ("pending", "done")
    assert InferenceJob.objects.get().attempt == 1


def test_a_job_whose_worker_dies_again_and_again_fails_by_name(client, settings) -> None:
    job = client.post("/api/inference/", {"model_id": upload(client), "model_input": INPUT}).json()
    for _ in range(settings.FL_EVENT_ATTEMPTS):
        assert job_claim(job_id=job["job_id"])
        assert not job_claim(job_id=job["job_id"])
        job_lease_drop(job_id=job["job_id"])

    sweep()

    answer = client.get(job["url"])
    assert (answer.status_code, answer.json()["code"]) == (503, "WORKER_LOST")


def test_a_question_whose_hint_was_lost_is_answered_after_the_next_sweep(
    client, settings, django_capture_on_commit_callbacks
) -> None:
    job = client.post("/api/inference/", {"model_id": upload(client), "model_input": INPUT}).json()
    register_sender("here", lambda task, ids: run_inference(*ids) if task == INFERENCE else None)
    settings.FL_EXECUTOR = "here"

    with django_capture_on_commit_callbacks(execute=True):
        sweep()  # too early: the first hint may still be on its way
    early = client.get(job["url"]).status_code
    InferenceJob.objects.update(lease_until=InferenceJob.objects.get().created_at)
    with django_capture_on_commit_callbacks(execute=True):
        sweep()

    assert (early, client.get(job["url"]).status_code) == (202, 200)


def test_one_user_cannot_fill_the_queue(client, login, settings) -> None:
    settings.FL_INFERENCE_QUEUE = 2
    model = upload(client)
    body = {"model_id": model, "model_input": INPUT}

    *_, refused = answers = [client.post("/api/inference/", body) for _ in range(3)]
    run_inference(InferenceJob.objects.latest("created_at").pk)

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert refused["Retry-After"] == str(refused.json()["retry_after"]) == "5"
    assert client.post("/api/inference/", body).status_code == 202


def test_a_full_disk_or_a_lost_database_is_waited_out(client, settings) -> None:
    job = client.post("/api/inference/", {"model_id": upload(client), "model_input": INPUT}).json()
    own, settings.FL_STAGING_DIR = settings.FL_STAGING_DIR, "/proc/nowhere"

    run_inference(job["job_id"])
    settings.FL_STAGING_DIR = own

    assert client.get(job["url"]).status_code == 202
    run_inference(job["job_id"])
    assert client.get(job["url"]).status_code == 200


def test_a_model_that_is_deleted_takes_its_questions_along(client) -> None:
    model = upload(client)
    job = client.post("/api/inference/", {"model_id": model, "model_input": INPUT}).json()

    client.delete(f"/api/models/{model}/")
    run_inference(job["job_id"])

    assert client.get(job["url"]).status_code == 404


@pytest.mark.django_db(transaction=True)
def test_a_quick_answer_comes_with_the_post(login, settings) -> None:
    client = login(person("owner", id=OWNER, actor=True))
    register_sender("here", lambda task, ids: run_inference(*ids) if task == INFERENCE else None)
    model = upload(client)
    settings.FL_EXECUTOR, settings.FL_INFERENCE_WAIT = "here", 20

    answer = client.post("/api/inference/", {"model_id": model, "model_input": INPUT})

    assert answer.status_code == 200
    assert answer.json()["inference"] == network()(X).argmax(1).tolist()


def test_the_methods_are_listed_with_their_options(client) -> None:
    found = {row["name"]: row for row in client.get("/api/uncertainty-methods/").json()}

    assert set(found) == {"NONE", "MC_DROPOUT", "SWAG", "ENSEMBLE"}
    assert found["SWAG"]["paper"] == "1902.02476"
    assert found["SWAG"]["defaults"]["scale"] == 1.0
    assert "N" in found["MC_DROPOUT"]["options_schema"]["properties"]


def test_a_question_with_a_key_is_asked_once(client, login) -> None:
    model = upload(client)
    body = {"model_id": model, "model_input": INPUT}
    key = {"HTTP_IDEMPOTENCY_KEY": "q1"}

    first = client.post("/api/inference/", body, **key)
    again = client.post("/api/inference/", body, **key)
    other = client.post("/api/inference/", {**body, "return_format": "npz"}, **key)
    run_inference(first.json()["job_id"])
    answered = client.post("/api/v1/inference/", body, **key)
    files = [
        client.post(
            "/api/inference/",
            {"model_id": model, "model_input": SimpleUploadedFile("x", save({"x": X.numpy()}))},
            format="multipart", HTTP_IDEMPOTENCY_KEY="q2",
        )
        for _ in range(2)
    ]  # fmt: skip

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert (other.status_code, other.json()["code"]) == (409, "IDEMPOTENCY_MISMATCH")
    assert answered.json()["inference"] == network()(X).argmax(1).tolist()
    assert files[0].json()["job_id"] == files[1].json()["job_id"]
    assert InferenceJob.objects.count() == 2
    assert client.post("/api/inference/", body).json()["job_id"] != first.json()["job_id"]


def test_a_question_is_durable_before_its_asker_is_told_to_come_back(client, monkeypatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(DurableStorage, "sync", lambda self, name: synced.append(name))
    body = {"model_id": upload(client), "model_input": torch.zeros(9_000, 2).tolist()}

    asked = client.post("/api/inference/", body)

    job = InferenceJob.objects.get(pk=asked.json()["job_id"])
    assert asked.status_code == 202
    assert synced == [job.input_file.name]


@pytest.mark.django_db(transaction=True)
def test_a_question_that_is_answered_at_once_waits_for_no_disk(
    login, settings, monkeypatch
) -> None:
    client = login(person("owner", id=OWNER, actor=True))
    register_sender("here", lambda task, ids: run_inference(*ids) if task == INFERENCE else None)
    model = upload(client)
    settings.FL_EXECUTOR, settings.FL_INFERENCE_WAIT = "here", 20
    # Too large for a row. The first time makes the program's file and a folder, which are synced.
    body = {"model_id": model, "model_input": torch.zeros(4_500, 4).tolist()}
    assert client.post("/api/inference/", body).status_code == 200
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    answer = client.post("/api/inference/", body)

    assert answer.status_code == 200
    assert synced == []


def test_a_program_whose_file_was_swept_is_made_anew(client, settings) -> None:
    model = upload(client)
    first = ask(client, model).json()["inference"]
    pool.close()
    ask(client, model)

    for path in Path(settings.FL_STAGING_DIR).rglob("*"):
        if path.is_file():
            path.unlink()
    again = ask(client, model)

    assert again.status_code == 200
    assert again.json()["inference"] == first
