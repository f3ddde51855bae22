"""What a researcher does: register, upload, create, start, wait."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

import fl_client
from fl_client import Connection, FLError, TrainingFailed
from tests.client.fake_server import Asked, FakeServer, Reply, refusal

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def fl(server: FakeServer) -> Iterator[Connection]:
    with fl_client.connect(server.url, token="key") as connection:
        yield connection


def created(**body: Any) -> Reply:
    return Reply(201, {"detail": "created", **body})


def states(server: FakeServer, *rows: dict[str, Any]) -> None:
    """Answers of GET trainings/t/, the last one for good."""
    left = list(rows)
    common = {"model": "m", "reason": None, "target_num_updates": 2}

    def answer(asked: Asked) -> Reply:
        return Reply(body=common | (left.pop(0) if len(left) > 1 else left[0]))

    server.routes["GET", "/api/trainings/t/"] = answer


def test_registering_needs_no_credentials(server: FakeServer) -> None:
    server.routes["POST", "/api/users/"] = lambda asked: created(id="u", token="new")

    with fl_client.connect(server.url) as fl:
        user = fl.users.register("ada", "pw", client=True)

    assert user["token"] == "new"
    assert "Authorization" not in server.asked[0].headers
    assert server.asked[0].json == {
        "username": "ada",
        "password": "pw",
        "actor": False,
        "client": True,
    }


def test_name_and_password_serve_for_the_first_contact(server: FakeServer) -> None:
    server.routes["GET", "/api/users/myself/"] = lambda asked: Reply(body={"id": "u"})

    with fl_client.connect(server.url, username="ada", password="pw") as fl:
        fl.users.me()

    assert server.asked[0].headers["Authorization"] == "Basic YWRhOnB3"


def test_a_calibration_report_is_waited_for(
    fl: Connection, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_client.models.time.sleep", lambda seconds: None)
    waiting = {"job_id": 7, "state": "pending", "url": "/api/calibrations/7/"}
    later = [waiting, {"job_id": 7, "state": "done", "ece": 0.25}]
    server.routes["POST", "/api/models/m/calibration/"] = lambda asked: Reply(202, waiting)
    server.routes["GET", "/api/calibrations/7/"] = lambda asked: Reply(body=later.pop(0))
    inputs, labels = np.zeros((2, 3), np.float32), np.array([0, 1])

    report = fl.models.calibration("m", inputs, labels, method="MC_DROPOUT", N=20, output="logits")

    assert report["ece"] == 0.25
    form = server.asked[0].body
    for part in (b"MC_DROPOUT", b'{"uncertainty": {"N": 20, "output": "logits"}}', b"15"):
        assert part in form
    assert {asked.path for asked in server.asked[1:]} == {"/api/calibrations/7/"}


def test_arrays_are_uploaded_as_safetensors(fl: Connection, server: FakeServer) -> None:
    server.routes["POST", "/api/models/"] = lambda asked: created(model_id="m2")
    weights = {"w": np.arange(3.0)}

    model = fl.models.upload(name="net", description="d", weights=weights, input_shape=[None, 3])

    asked = server.asked[0]
    assert model == "m2"
    assert asked.form == {"name": ["net"], "description": ["d"], "input_shape": ["None", "3"]}
    np.testing.assert_array_equal(load(asked.files["model_file"])["w"], weights["w"])


def test_preprocessing_travels_with_the_model_or_later(
    fl: Connection, server: FakeServer, tmp_path: Path
) -> None:
    server.routes["POST", "/api/models/"] = lambda asked: created(model_id="m2")
    server.routes["POST", "/api/models/m2/preprocessing/"] = lambda asked: Reply(202, {})
    pipeline = {"steps": [{"step": "to_tensor"}]}
    file = tmp_path / "compose.pt"
    file.write_bytes(b"torchvision's")

    fl.models.upload(name="n", description="d", weights={"w": np.zeros(1)}, preprocessing=pipeline)
    fl.models.set_preprocessing("m2", file)

    first, second = (asked.files["model_preprocessing_file"] for asked in server.asked)
    assert json.loads(first) == pipeline
    assert second == b"torchvision's"


def test_an_image_is_asked_with_until_there_is_an_answer(
    fl: Connection, server: FakeServer, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    waiting = {"job_id": 3, "state": "pending", "url": "/api/inference/3/"}
    answers = [Reply(202, waiting), Reply(body={"inference": [1], "uncertainty": {}})]
    server.routes["POST", "/api/inference/"] = lambda asked: Reply(202, waiting)
    server.routes["GET", "/api/inference/3/"] = lambda asked: answers.pop(0)

    answer = fl.models.ask("m", picture, method="MC_DROPOUT", options={"uncertainty": {"N": 3}})

    asked = server.asked[0]
    assert answer["inference"] == [1]
    assert asked.files == {"model_input": b"a picture"}
    assert asked.form == {
        "model_id": ["m"], "return_format": ["json"], "uncertainty_method": ["MC_DROPOUT"],
        "options": ['{"uncertainty": {"N": 3}}'],
    }  # fmt: skip


def test_a_question_that_is_one_too_many_waits_and_is_asked_once(
    fl: Connection, server: FakeServer
) -> None:
    server.routes["POST", "/api/inference/"] = lambda asked: Reply(body={"inference": [0]})
    server.faults["/api/inference/"] = [refusal(429, "TOO_MANY_QUESTIONS", Retry_After="0")]

    fl.models.ask("m", [[1.0]])

    first, second = (asked.headers["Idempotency-Key"] for asked in server.asked)
    assert first == second


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [([[0.5, 1.0]], np.float32), ([[1, 2]], np.int64), (np.zeros((1, 2)), np.float64)],
)
def test_numbers_are_asked_with_as_one_tensor(
    fl: Connection, server: FakeServer, inputs: Any, dtype: Any
) -> None:
    server.routes["POST", "/api/inference/"] = lambda asked: Reply(body={"inference": [0]})

    fl.models.ask("m", inputs)

    sent = load(server.asked[0].files["model_input"])["input"]
    assert sent.dtype == dtype
    np.testing.assert_array_equal(sent, np.asarray(inputs, dtype))


def test_an_answer_that_does_not_come_is_a_timeout(fl: Connection, server: FakeServer) -> None:
    waiting = Reply(202, {"job_id": 3, "state": "pending", "url": "/api/inference/3/"})
    server.routes["POST", "/api/inference/"] = lambda asked: waiting

    with pytest.raises(TimeoutError, match="/api/inference/3/"):
        fl.models.ask("m", [[1.0]], timeout=-1)


def test_a_module_is_uploaded_by_its_state_dict(fl: Connection, server: FakeServer) -> None:
    torch = pytest.importorskip("torch")
    server.routes["POST", "/api/models/"] = lambda asked: created(model_id="m2")
    module = torch.nn.Linear(3, 2)

    fl.models.upload(name="net", description="d", weights=module)

    sent = load(server.asked[0].files["model_file"])
    np.testing.assert_array_equal(sent["weight"], module.weight.detach().numpy())


def test_a_file_is_uploaded_as_it_is(fl: Connection, server: FakeServer, tmp_path: Path) -> None:
    server.routes["POST", "/api/models/"] = lambda asked: created(model_id="m2")
    (tmp_path / "net.pt").write_bytes(b"\r\n--any bytes\r\n")

    fl.models.upload(name="net", description="d", weights=tmp_path / "net.pt")

    assert server.asked[0].files["model_file"] == b"\r\n--any bytes\r\n"


def test_a_creation_that_is_tried_again_repeats_key_and_bytes(
    fl: Connection, server: FakeServer
) -> None:
    server.routes["POST", "/api/models/"] = lambda asked: created(model_id="m2")
    server.faults["/api/models/"] = [refusal(503, "", Retry_After="0")]

    fl.models.upload(name="net", description="d", weights={"w": np.zeros(2)})

    first, second = server.seen("/api/models/")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert first.body == second.body


def test_what_may_not_happen_twice_is_not_tried_again(fl: Connection, server: FakeServer) -> None:
    server.routes["POST", "/api/trainings/t/start/"] = lambda asked: refusal(503, "")

    with pytest.raises(fl_client.ServerError):
        fl.trainings.get("t").start()

    assert len(server.asked) == 1


def test_a_training_is_created_started_and_waited_for(fl: Connection, server: FakeServer) -> None:
    server.routes["POST", "/api/trainings/"] = lambda asked: created(training_id="t")
    server.routes["POST", "/api/trainings/t/start/"] = lambda asked: Reply(202, {"detail": ""})
    states(
        server,
        {"state": "O", "round": 0},
        {"state": "O", "round": 1},
        {"state": "O", "round": 1},
        {"state": "C", "round": 2},
    )
    rounds = []

    training = fl.trainings.create(
        model="m", rounds=2, clients=["u1"], aggregation_method="FedProx", options={"mu": 0.1}
    )
    training.start()
    ended = training.wait(timeout=20, on_round=lambda now: rounds.append(now["round"]))

    assert server.asked[0].json == {
        "model_id": "m",
        "target_num_updates": 2,
        "metric_names": [],
        "aggregation_method": "FedProx",
        "options": {"mu": 0.1},
        "clients": ["u1"],
    }
    assert rounds == [1, 2]
    assert ended["state"] == "C"


def test_waiting_for_a_training_that_fails_raises_its_reason(
    fl: Connection, server: FakeServer
) -> None:
    states(server, {"state": "E", "round": 1, "reason": "too few clients answered"})

    with pytest.raises(TrainingFailed, match="too few clients answered"):
        fl.trainings.get("t").wait()


def test_a_round_with_fewer_updates_than_asked_for_is_told_once(
    fl: Connection, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ({"round": n, "text": f"round {n}: 1 of 2 sites (bob failed)"} for n in (0, 2))
    states(
        server,
        {"state": "O", "round": 1, "gaps": [first]},
        {"state": "O", "round": 2, "gaps": [first]},
        {"state": "C", "round": 3, "gaps": [first, second]},
    )

    fl.trainings.get("t").wait(timeout=20)

    assert caplog.messages == [first["text"], second["text"]]


def test_waiting_ends_with_the_timeout(fl: Connection, server: FakeServer) -> None:
    states(server, {"state": "O", "round": 0})

    with pytest.raises(TimeoutError):
        fl.trainings.get("t").wait(timeout=0.1)


def test_metrics_are_those_of_the_model_that_is_trained(fl: Connection, server: FakeServer) -> None:
    row = {"key": "acc", "value_float": 1.0, "step": 1, "reporter": None}
    states(server, {"state": "C", "round": 2, "model": "clone"})
    server.routes["GET", "/api/models/clone/metrics/"] = lambda asked: Reply(body=[row])

    assert fl.trainings.get("t").metrics() == [row]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, fl_client.AuthenticationFailed),
        (403, fl_client.NotPermitted),
        (404, fl_client.NotFound),
        (409, fl_client.Conflict),
        (413, fl_client.TooLarge),
        (422, fl_client.Unusable),
        (429, fl_client.Throttled),
        (500, fl_client.ServerError),
        (400, FLError),
    ],
)
def test_refusals_are_typed_and_keep_code_detail_and_fields(
    fl: Connection, server: FakeServer, status: int, kind: type[FLError]
) -> None:
    fields = [{"pointer": "/username", "code": "INVALID", "detail": "is taken"}]
    body = {"detail": "no", "code": "REFUSED", "errors": fields, "request_id": "r-9"}
    server.routes["POST", "/api/users/"] = lambda asked: Reply(status, body, {"Retry-After": "0"})
    fl.transport.attempts = 1

    with pytest.raises(FLError) as caught:
        fl.users.register("ada", "pw")

    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.request_id) == (status, "REFUSED", "r-9")
    assert error.errors == fields
    assert "/username: is taken" in str(error)


def test_an_answer_that_is_no_json_is_still_a_typed_error(
    fl: Connection, server: FakeServer
) -> None:
    server.routes["GET", "/api/users/myself/"] = lambda asked: Reply(200, b"<html>Log in</html>")

    with pytest.raises(fl_client.ConnectionFailed, match="proxy"):
        fl.users.me()


def test_a_redirect_is_named_not_followed(fl: Connection, server: FakeServer) -> None:
    server.routes["GET", "/api/users/myself/"] = lambda asked: Reply(
        301, None, {"Location": "https://elsewhere.test/api/"}
    )

    with pytest.raises(FLError, match=r"redirects to https://elsewhere\.test/api/"):
        fl.users.me()


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://token@host"])
def test_an_address_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|URL"):
        fl_client.connect(url)
