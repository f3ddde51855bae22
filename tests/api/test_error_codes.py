"""Every code that the documentation lists is a real answer to a real request of some test, and no other is given.

All tests of this folder note what they are refused with (`provoked.py`); here are the requests for codes that no other
test is about, and at the end of a whole run the two lists are compared.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError, connection
from django.utils import timezone
from rest_framework.test import APIClient
from safetensors.numpy import save

from fl_server.embedded.web import Web
from fl_server.front.admission import NOBODY
from fl_server.front.refusals import REFUSALS
from fl_server_ai.inference import pool
from fl_server_ai.inference.tasks import run_inference
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_core.models import ApiToken, InferenceJob, Round, User
from fl_server_core.services.parts import Parts
from fl_server_core.services.tokens import token_issue
from tests.ai.hostile import CORPUS
from tests.ai.hostile.building import named, program, saved_parts, scripted, storage, tensor, zipped
from tests.api.provoked import PROVOKED
from tests.lines import Line
from tests.scenes import person, scene, weights

DOCS = Path(__file__).parents[2] / "docs" / "error_codes.py"
TUS = {"HTTP_TUS_RESUMABLE": "1.0.0"}
STAND_INS = "tests.ai.test_sandbox_lockdown"  # children that misbehave as their environment says
Provoke = Callable[["Desk"], Any]
TABLE: list[tuple[int, str, Provoke]] = []


def provokes(status: int, code: str) -> Callable[[Provoke], Provoke]:
    """The function's answer has this status and code."""

    def add(function: Provoke) -> Provoke:
        TABLE.append((status, code, function))
        return function

    return add


class Desk:
    """Who asks, and what the test may change around him."""

    def __init__(self, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.monkeypatch = settings, monkeypatch

    def client(self, user: User) -> APIClient:
        client = APIClient(raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=user)}")
        return client

    def anybody(self) -> APIClient:
        return self.client(person("ada", actor=True, client=True))

    def model(self, client: APIClient, data: bytes, **fields: Any) -> Any:
        body = {"name": "m", "description": "", "model_file": SimpleUploadedFile("m", data)}
        return client.post("/api/models/", {**body, **fields}, format="multipart")

    def answer(self, posted: Any, client: APIClient) -> Any:
        """What a worker comes to, or the refusal at once."""
        if posted.status_code != 202:
            return posted
        run_inference(posted.json()["job_id"])
        return client.get(posted.json()["url"])

    def ask(self, given: Any = (1.0, 2.0, 3.0, 4.0), **fields: Any) -> Any:
        """A question to a scripted model that adds four numbers."""
        client = self.anybody()
        model = self.model(client, scripted()).json()["model_id"]
        body = {"model_id": model, "model_input": list(given), **fields}
        return self.answer(client.post("/api/inference/", body, format="json"), client)

    def sandbox(self, **settings: Any) -> None:
        """Children that are started otherwise."""
        pool.close()
        kind = pool.SandboxPool
        self.monkeypatch.setattr(pool, "SandboxPool", lambda **given: kind(**{**given, **settings}))


@provokes(400, "INVALID_HOST")
def call_it_by_another_name(desk: Desk) -> Any:
    return desk.anybody().get("/api/", HTTP_HOST="elsewhere.example")


@provokes(400, "BAD_KEY")
def long_key(desk: Desk) -> Any:
    body = {"name": "people"}
    return desk.anybody().post("/api/groups/", body, format="json", HTTP_IDEMPOTENCY_KEY="k" * 201)


@provokes(400, "BAD_WAIT")
def wait_for_a_word(desk: Desk) -> Any:
    return desk.anybody().get("/api/tasks/?wait=soon")


@provokes(400, "BAD_PROGRESS")
def too_much_progress(desk: Desk) -> Any:
    running = scene()
    body = {"step": 1, "metrics": {f"{i:0500}": 1.0 for i in range(900)}}
    path = f"/api/tasks/{running.task('ada').pk}/progress/"
    return desk.client(running.sites["ada"]).post(path, body, format="json")


@provokes(400, "TOO_MANY_ROUNDS")
def rounds_without_end(desk: Desk) -> Any:
    running = scene(started=False)
    body = {
        "model_id": str(running.model.pk), "target_num_updates": 2**31 - 1, "metric_names": [],
        "aggregation_method": "FedAvg", "options": {"daisy_chain_period": 2},
    }  # fmt: skip
    return desk.client(running.actor).post("/api/trainings/", body, format="json")


@provokes(400, "NO_SAMPLES")
def judged_by_nothing(desk: Desk) -> Any:
    client = desk.anybody()
    model = desk.model(client, scripted()).json()["model_id"]
    body = {
        "model_input": SimpleUploadedFile("x", save({"x": np.zeros((0, 4), np.float32)})),
        "labels": SimpleUploadedFile("y", save({"y": np.zeros(0, np.int64)})),
        "options": '{"uncertainty": {"output": "logits"}}',
    }
    posted = client.post(f"/api/models/{model}/calibration/", body, format="multipart")
    return desk.answer(posted, client)


@provokes(400, "NO_MODELS")
def an_ensemble_of_gradients(desk: Desk) -> Any:
    running = scene(started=False)
    body = {
        "model_id": str(running.model.pk), "target_num_updates": 1, "metric_names": [],
        "aggregation_method": "FedSGD", "uncertainty_method": "ENSEMBLE",
    }  # fmt: skip
    return desk.client(running.actor).post("/api/trainings/", body, format="json")


@provokes(401, "TOKEN_EXPIRED")
def old_token(desk: Desk) -> Any:
    client = desk.anybody()
    ApiToken.objects.update(expires_at=timezone.now() - timedelta(days=1))
    return client.get("/api/users/myself/")


@provokes(404, "UPLOAD_GONE")
def upload_without_its_file(desk: Desk) -> Any:
    client = desk.anybody()
    made = client.post("/api/uploads/", HTTP_UPLOAD_LENGTH="9", **TUS).json()["id"]
    Parts(made).delete()
    kind = "application/offset+octet-stream"
    return client.generic(
        "PATCH", f"/api/uploads/{made}/", b"x", kind, HTTP_UPLOAD_OFFSET="0", **TUS
    )


class Interrupted(io.BytesIO):
    """A body in whose middle its sender asks how far it is, as after a line that seemed dead."""

    def __init__(self, data: bytes, ask: Callable[[], Any]) -> None:
        super().__init__(data)
        self.ask = ask

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 0:
            self.ask()
        return super().read(size)


@provokes(409, "UPLOAD_TAKEN_OVER")
def another_request_for_the_same_upload(desk: Desk) -> Any:
    client, data = desk.anybody(), bytes(200_000)
    made = client.post("/api/uploads/", HTTP_UPLOAD_LENGTH=str(len(data)), **TUS).json()["id"]
    url, kind = f"/api/uploads/{made}/", "application/offset+octet-stream"
    body = {"wsgi.input": Interrupted(data, lambda: client.head(url, **TUS))}
    return client.generic("PATCH", url, data, kind, HTTP_UPLOAD_OFFSET="0", **TUS, **body)


@provokes(405, "METHOD_NOT_ALLOWED")
def put_tasks(desk: Desk) -> Any:
    return desk.anybody().put("/api/tasks/")


@provokes(409, "NO_DEADLINE")
def more_time_for_nobody(desk: Desk) -> Any:
    running = scene()
    Round.objects.update(deadline=None)
    path = f"/api/trainings/{running.training.pk}/extend/"
    return desk.client(running.actor).post(path, {"seconds": 60}, format="json")


@provokes(409, "NO_PARTICIPANTS")
def start_alone(desk: Desk) -> Any:
    running = scene(started=False)
    gone = [user.pk for user in running.sites.values()]
    training_clients_remove(training=running.training, user=running.actor, clients=gone)
    return desk.client(running.actor).post(f"/api/trainings/{running.training.pk}/start/")


@provokes(409, "POLICY_UNSATISFIABLE")
def start_with_too_few(desk: Desk) -> Any:
    running = scene(started=False, min_updates=5)
    return desk.client(running.actor).post(f"/api/trainings/{running.training.pk}/start/")


@provokes(409, "STILL_FAILING")
def retry_without_sites(desk: Desk) -> Any:
    running = scene(rounds=1, skip_model_tests=True)
    for name, user in running.sites.items():
        task_failure(task=running.task(name), user=user, code="BROKEN", text="no data")
    gone = [user.pk for user in running.sites.values()]
    training_clients_remove(training=running.training, user=running.actor, clients=gone)
    return desk.client(running.actor).post(f"/api/trainings/{running.training.pk}/retry/")


@provokes(429, "TOO_MANY_QUESTIONS")
def one_question_too_many(desk: Desk) -> Any:
    desk.settings.FL_INFERENCE_QUEUE = 1
    client = desk.anybody()
    model = desk.model(client, scripted()).json()["model_id"]
    body = {"model_id": model, "model_input": [1.0, 2.0, 3.0, 4.0]}
    client.post("/api/inference/", body, format="json")
    return client.post("/api/inference/", body, format="json")


@provokes(409, "TOO_STALE")
def answer_to_a_round_long_ago(desk: Desk) -> Any:
    running = scene(
        "fast", "slow", rounds=4, late_updates="next_round", max_staleness=0,
        skip_model_tests=True, weighting="uniform",
    )  # fmt: skip
    running.send("fast", 2.0)
    Round.objects.update(deadline=timezone.now() - timedelta(seconds=1))
    sweep()
    running.work()
    body = {
        "round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("w", save(weights(1.0))),
    }  # fmt: skip
    path = f"/api/models/{running.training.model_id}/"
    return desk.client(running.sites["slow"]).post(path, body, format="multipart")


@provokes(409, "WEIGHTS_DELETED")
def question_to_weights_that_are_deleted_meanwhile(desk: Desk) -> Any:
    client = desk.anybody()
    model = desk.model(client, scripted()).json()["model_id"]
    body = {"model_id": model, "model_input": [1.0, 2.0, 3.0, 4.0]}
    posted = client.post("/api/inference/", body, format="json")
    InferenceJob.objects.update(weights=None)  # as the database does when the file's row goes
    return desk.answer(posted, client)


@provokes(422, "ANSWER_TOO_LARGE")
def more_numbers_than_json_takes(desk: Desk) -> Any:
    desk.settings.FL_MAX_JSON_NUMBERS = 1
    return desk.ask(options={"uncertainty": {"task": "regression"}})


@provokes(422, "OUTPUT_SHAPE")
def one_output_for_classes(desk: Desk) -> Any:
    options = {"uncertainty": {"task": "multiclass", "output": "logits"}}
    return desk.ask(options=options, uncertainty_method="NONE")


@provokes(422, "NOT_TRAINABLE")
def train_a_mean(desk: Desk) -> Any:
    client = desk.anybody()
    member = desk.model(client, scripted()).json()["model_id"]
    body = {"name": "mean", "description": "", "type": "MEAN", "models": [member]}
    mean = client.post("/api/models/", body, format="multipart").json()["model_id"]
    wanted = {
        "model_id": mean, "target_num_updates": 1, "metric_names": [], "aggregation_method": "FedAvg",
    }  # fmt: skip
    return client.post("/api/trainings/", wanted, format="json")


@provokes(422, "OVERLAPPING_TENSORS")
def tensors_that_share_numbers(desk: Desk) -> Any:
    both = named({"w": tensor(), "v": tensor(storage(), size=b"(J\x02\x00\x00\x00t")})
    return desk.model(desk.anybody(), zipped(*saved_parts(program(both))))


def hostile(name: str) -> Provoke:
    return lambda desk: desk.model(desk.anybody(), CORPUS[name].build())


for _name, _file in CORPUS.items():
    for _status, _code in ((422, "PICKLED_ENTRY"), (422, "UNSUPPORTED_LAYOUT")):
        if _file.codes == {_code} and not any(_code == row[1] for row in TABLE):
            provokes(_status, _code)(hostile(_name))


@provokes(413, "HEADER_TOO_LARGE")
def a_program_of_nine_megabytes(desk: Desk) -> Any:
    buffer = io.BytesIO(program(b"N0" * (9 * 2**19)))
    return desk.model(desk.anybody(), zipped(*saved_parts(buffer.getvalue())))


@provokes(422, "SANDBOX_CRASHED")
def a_program_that_crashes(desk: Desk) -> Any:
    desk.sandbox(entry=STAND_INS, environment={"BEHAVIOUR": "segfault"})
    return desk.ask()


@provokes(422, "SANDBOX_MEMORY")
def a_program_without_measure(desk: Desk) -> Any:
    desk.sandbox(entry=STAND_INS, environment={"BEHAVIOUR": "out of memory"})
    return desk.ask()


@provokes(503, "SANDBOX_UNAVAILABLE")
def a_sandbox_that_does_not_start(desk: Desk) -> Any:
    desk.sandbox(entry="no.such.module")
    return desk.ask()


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


@provokes(503, "UNAVAILABLE")
def a_bug_in_the_worker(desk: Desk) -> Any:
    desk.monkeypatch.setattr(pool, "predict", broken)
    return desk.ask()


@provokes(500, "SERVER_ERROR")
def a_bug_in_the_server(desk: Desk) -> Any:
    desk.monkeypatch.setattr("fl_server_api.views.tasks.task_wait", broken)
    return desk.anybody().get("/api/tasks/")


@provokes(503, "DATABASE_AWAY")
def a_database_that_is_away(desk: Desk) -> Any:
    client = desk.anybody()

    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("server closed the connection unexpectedly")

    with connection.execute_wrapper(away):
        return client.get("/api/users/myself/")


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    pool.close()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("status", "code", "provoke"), [pytest.param(*row, id=row[1]) for row in TABLE]
)
def test_a_code_is_what_its_request_is_answered_with(
    settings: Any, monkeypatch: pytest.MonkeyPatch, status: int, code: str, provoke: Provoke
) -> None:
    answer = provoke(Desk(settings, monkeypatch))

    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.content
    assert answer.json()["detail"]
    if "SANDBOX" in code:
        pool.close()


FRONTS = {  # what the server's front refuses by itself, and what it says so to
    "BAD_REQUEST": b"nonsense\r\n\r\n",
    "HEAD_TOO_LARGE": b"GET /" + b"x" * 2**17,
    "LENGTH_REQUIRED": (
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (2**17, bytes(2**17))
    ),
    "TOO_MANY_BODIES": (
        b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % 2**17
    ),
    "TOO_SLOW": b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n",
}


def reads(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """An application that wants all bodies."""
    with contextlib.suppress(OSError):
        environ["wsgi.input"].read()
    start_response("200 OK", [])
    return []


def test_a_code_of_the_front_is_what_it_answers(settings: Any) -> None:
    settings.FL_STALLED_SECONDS = 0.1
    web = Web(("127.0.0.1", 0), reads, threads=1, tls=None)
    web.open()
    while web.front.bodies.take(NOBODY):
        pass
    answers = set()
    for said in FRONTS.values():
        with Line(web.port) as line:
            line.say(said)
            told = line.told()
            answers.add((told.status, told.json["code"]))
    web.close()

    assert answers == {(status, code) for code, (status, _) in REFUSALS.items()}
    assert {code for _, code in answers} == set(FRONTS)
    PROVOKED.update(answers)


@cache
def documented() -> dict[tuple[int, str], Any]:
    """What the reference page lists: read from the source by what makes it, and the front's own."""
    spec = importlib.util.spec_from_file_location("error_codes", DOCS)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {(entry.status, entry.code): entry for entry in module.refusals()}
    for code, (status, said) in REFUSALS.items():
        found.setdefault((status, code), module.Entry(status, code)).says[said] = None
    return found


def test_each_documented_code_says_something() -> None:
    for entry in documented().values():
        assert "".join(entry.says), entry


def test_nothing_is_answered_that_is_not_documented() -> None:
    unknown = PROVOKED - set(documented())

    assert not unknown


# Left out, with what it needs, unless all of this folder runs; and then the last.
@pytest.mark.whole_folder
def test_every_documented_code_was_provoked_over_http() -> None:
    missing = set(documented()) - PROVOKED

    assert not missing, (
        "add a request to this file, or say in docs/error_codes.py that it is no answer"
    )
