"""A site that polls: rounds, refusals, outages, kills."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_client
from fl_client import AuthenticationFailed, Context, FitResult
from fl_client.journal import Journal
from tests.client.conftest import Site
from tests.client.fake_server import FakeServer, Reply, refusal

pytestmark = pytest.mark.enable_socket


def run(site: fl_client.Client, server: FakeServer, folder: Path, **more: Any) -> Any:
    return fl_client.run(site, url=server.url, token="key", workdir=folder, **more)


def test_a_round_is_trained_then_evaluated_then_done(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task("train", round=0)
    server.add_task("evaluate", round=1)

    final = run(site, server, tmp_path)

    assert final == {"id": "m"}
    assert site.configs == [{"mu": 0.01}]
    update = server.update_weights(0)
    np.testing.assert_array_equal(update["w"], np.arange(6, dtype=np.float32).reshape(2, 3) + 1)
    assert server.updates[0].form == {
        "round": ["0"],
        "sample_size": ["7"],
        "num_steps": ["3"],
        "metric_names": ["loss"],
        "metric_values": ["0.5"],
    }
    assert server.metrics[0].form == {
        "round": ["1"],
        "sample_size": ["11"],
        "metric_names": ["accuracy"],
        "metric_values": ["0.25"],
    }
    assert {asked.headers["Authorization"] for asked in server.asked} == {"Token key"}
    assert server.seen("/api/tasks/")[0].query == {"wait": ["25"]}


def test_the_upload_is_taken_back_to_the_dtype_of_the_model(
    server: FakeServer, tmp_path: Path
) -> None:
    class Float64(Site):
        def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
            return FitResult({n: w.astype(np.float64) for n, w in weights.items()}, 1)

    server.add_task()

    run(Float64(), server, tmp_path)

    assert {w.dtype for w in server.update_weights(0).values()} == {np.dtype("float32")}


def test_trouble_on_the_way_is_retried_with_the_same_bytes(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    server.faults["/api/tasks/"] = [refusal(503, "DOWN", Retry_After="0")]
    server.faults["/api/models/m/"] = [
        refusal(429, "SLOW", Retry_After="0"),
        refusal(408, "TOO_SLOW"),
    ]
    attempts = []
    accept = server.contract

    def upload(asked: Any) -> Reply:
        attempts.append(asked.body)
        return refusal(503, "AWAY") if len(attempts) == 1 else accept(asked)

    server.routes["POST", "/api/models/m/"] = upload

    assert run(site, server, tmp_path) == {"id": "m"}

    assert site.fits == 1
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]


def test_a_server_that_is_not_there_yet_is_waited_for(site: Site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    offline = threading.Event()
    final: list[Any] = []

    def participate() -> None:
        final.append(
            fl_client.run(
                site,
                url=f"http://127.0.0.1:{port}",
                token="key",
                workdir=tmp_path,
                on_event=lambda name, fields: offline.set() if name == "offline" else None,
            )
        )

    agent = threading.Thread(target=participate)
    agent.start()
    assert offline.wait(10)
    with FakeServer(port) as server:
        server.add_model({"w": np.zeros(2, np.float32)})
        server.add_task()
        agent.join(20)

    assert final == [{"id": "m"}]
    assert site.fits == 1


def test_a_lasting_outage_during_the_upload_costs_no_second_training(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    attempts = []
    accept = server.contract

    def upload(asked: Any) -> Reply:
        attempts.append(asked.body)
        return refusal(500, "BROKEN") if len(attempts) <= 2 else accept(asked)

    server.routes["POST", "/api/models/m/"] = upload

    run(site, server, tmp_path)

    assert site.fits == 1
    assert len(server.updates) == 1
    assert list(tmp_path.glob("update-*")) == []


def test_a_site_that_is_told_to_wait_asks_again(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    wait = {"state": "wait", "retry_after": 0.0, "reason": "the round has not begun"}
    server.faults["/api/tasks/"] = [Reply(body=wait), Reply(body=wait)]

    assert run(site, server, tmp_path) == {"id": "m"}

    assert site.fits == 1


def test_a_journalled_update_whose_bytes_rotted_is_trained_anew(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    task = server.add_task()
    journal = Journal(tmp_path)
    journal.place(task["id"]).write_bytes(b"rotten")
    journal.put(task["id"], "0" * 64, [("round", "0")])

    run(site, server, tmp_path)

    assert site.fits == 1
    assert server.updates[0].form["sample_size"] == ["7"]


def test_an_unreadable_journal_is_begun_anew(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "journal.json").write_text('{"task": ')
    server.add_task()

    run(site, server, tmp_path)

    assert len(server.updates) == 1


def test_an_exception_in_the_sites_code_is_reported_and_the_next_task_taken(
    server: FakeServer, tmp_path: Path
) -> None:
    class Clumsy(Site):
        def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
            if context.task["round"] == 0:
                raise ZeroDivisionError("no patients")
            return super().fit(weights, config, context)

    server.add_task(round=0)
    server.add_task(round=1)

    run(Clumsy(), server, tmp_path)

    assert server.failures[0]["code"] == "TRAIN_EXCEPTION"
    assert server.failures[0]["text"] == "ZeroDivisionError"
    assert len(server.updates) == 1


class Leaky(Site):
    """Its exceptions quote a patient."""

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
        raise KeyError("Jane Doe")

    def evaluate(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
        return self.fit(weights, config, context)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_of_an_exception_only_its_type_leaves_the_site_but_the_log_there_has_all(
    server: FakeServer, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_task(kind)

    run(Leaky(), server, tmp_path)

    assert server.failures == [{"code": "TRAIN_EXCEPTION", "text": "KeyError", "log_tail": ""}]
    assert "Jane Doe" in caplog.text
    assert not any(b"Jane" in asked.body or b".py" in asked.body for asked in server.asked)


@pytest.mark.parametrize(
    ("report_errors", "text", "tail"),
    [("text", "KeyError: 'Jane Doe'", ""), ("traceback", "KeyError: 'Jane Doe'", " fit")],
)
def test_a_site_may_choose_to_say_more(
    server: FakeServer, tmp_path: Path, report_errors: str, text: str, tail: str
) -> None:
    server.add_task()

    run(Leaky(), server, tmp_path, report_errors=report_errors)

    assert server.failures[0]["text"] == text
    assert server.failures[0]["log_tail"].endswith(tail)
    assert bool(server.failures[0]["log_tail"]) == (report_errors == "traceback")


def test_a_site_may_describe_its_own_failures(server: FakeServer, tmp_path: Path) -> None:
    class Describing(Leaky):
        def describe_failure(self, error: Exception) -> tuple[str, str] | None:
            return ("a record is incomplete", "") if isinstance(error, KeyError) else None

    server.add_task()

    run(Describing(), server, tmp_path)

    assert server.failures[0]["text"] == "a record is incomplete"


def test_an_unknown_way_to_report_errors_is_refused_before_anything_is_sent(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="traceback"):
        run(site, server, tmp_path, report_errors="everything")

    assert server.asked == []


def test_a_client_without_evaluate_declines_in_one_line(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class TrainsOnly(fl_client.Client):
        pass

    server.add_task("evaluate")

    run(TrainsOnly(), server, tmp_path)

    assert server.failures[0]["code"] == "EVALUATE_NOT_IMPLEMENTED"
    assert server.seen("/api/models/m/") == []
    assert "Traceback" not in caplog.text


def test_the_log_says_who_waits_where_and_for_what_whenever_that_changes(
    server: FakeServer, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fl.client")
    server.routes["GET", "/api/users/myself/"] = lambda asked: Reply(body={"username": "ward7"})
    server.faults["/api/tasks/"] = [
        Reply(body={"state": "wait", "retry_after": 0.0, "reason": reason})
        for reason in ("no training yet", "no training yet", "others are training")
    ]

    run(site, server, tmp_path)

    assert caplog.messages == [
        f"ward7 at {server.url}/api/: asking for tasks",
        "waiting: no training yet",
        "waiting: others are training",
    ]


def test_a_plain_script_shows_what_it_does(server: FakeServer, tmp_path: Path) -> None:
    server.add_task()
    argv = [sys.executable, "-c", AGENT, server.url, str(tmp_path / "log"), str(tmp_path / "w")]

    done = subprocess.run(
        argv, cwd=Path(__file__).parents[2], check=True, timeout=30, capture_output=True, text=True
    )

    assert f"INFO an account at {server.url}/api/: asking for tasks\n" in done.stderr
    assert "INFO round 0: train uploaded\n" in done.stderr


def test_an_account_that_is_no_client_ends_with_a_next_step(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    wait = {"state": "wait", "retry_after": 30.0, "reason": "no client", "code": "NOT_A_CLIENT"}
    server.faults["/api/tasks/"] = [Reply(body=wait)]

    with pytest.raises(fl_client.NotPermitted, match="Next step: ask the server's admin to reg"):
        run(site, server, tmp_path)


@pytest.mark.parametrize(
    "weights",
    [{"w": np.zeros((2, 3), np.float32)}, {"w": np.zeros(1, np.float32), "b": np.zeros(1)}],
    ids=["missing tensor", "other shape"],
)
def test_an_update_that_does_not_fit_the_model_is_not_sent(
    server: FakeServer, tmp_path: Path, weights: dict[str, Any]
) -> None:
    class Wrong(Site):
        def fit(self, given: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
            return FitResult(weights, 1)

    server.add_task()

    run(Wrong(), server, tmp_path)

    assert server.updates == []
    assert server.failures[0]["text"].startswith("ValueError")


def test_a_kind_of_task_from_the_future_is_given_back(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task("dream")

    run(site, server, tmp_path)

    assert server.failures[0]["code"] == "UNSUPPORTED_KIND"


def test_a_round_that_closed_meanwhile_is_no_trouble(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    events = []

    def closed(asked: Any) -> Reply:
        server.tasks.clear()
        return refusal(409, "ROUND_CLOSED")

    server.routes["POST", "/api/models/m/"] = closed

    final = run(site, server, tmp_path, on_event=lambda name, fields: events.append(name))

    assert final == {"id": "m"}
    assert events == ["task", "closed", "done"]
    assert server.failures == []


def test_an_update_that_the_server_refuses_is_given_up_with_its_code(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    server.routes["POST", "/api/models/m/"] = lambda asked: refusal(422, "NON_FINITE")

    run(site, server, tmp_path)

    assert server.failures[0]["code"] == "NON_FINITE"
    assert site.fits == 1


def test_the_server_can_stop_a_training_through_progress(
    server: FakeServer, tmp_path: Path
) -> None:
    class Long(Site):
        def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> Any:
            context.progress(1, 100, {"loss": 2.0})
            raise AssertionError("unreachable")

    task = server.add_task()
    events = []

    def stop(asked: Any) -> Reply:
        server.tasks.clear()
        return Reply(body={"command": "stop", "deadline": None})

    server.routes["POST", f"/api/tasks/{task['id']}/progress/"] = stop

    run(Long(), server, tmp_path, on_event=lambda name, fields: events.append(name))

    assert events == ["task", "stopped", "done"]
    progress = server.seen(f"/api/tasks/{task['id']}/progress/")[0]
    assert progress.json == {"step": 1, "of": 100, "metrics": {"loss": 2.0}}
    assert server.failures == []


def test_a_model_with_a_wrong_digest_is_never_trained_on(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task()
    server.routes["GET", "/api/models/m/"] = lambda asked: Reply(
        200, server.models["m"], {"ETag": f'"{"0" * 64}"'}
    )

    run(site, server, tmp_path)

    assert site.fits == 0
    assert server.failures[0]["code"] == "DIGEST_MISMATCH"


def test_credentials_never_reach_another_origin(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    with FakeServer() as elsewhere:
        elsewhere.models = dict(server.models)
        model = server.add_task()["model"] | {"url": f"{elsewhere.url}/api/models/m/"}
        server.tasks[0]["model"] = model
        server.add_task(round=1, upload_url=f"{elsewhere.url}/api/models/m/")

        run(site, server, tmp_path)

        assert len(server.updates) == 1
        assert [asked.method for asked in elsewhere.asked] == ["GET"]
        assert "Authorization" not in elsewhere.asked[0].headers
        assert server.failures[0]["code"] == "FOREIGN_ORIGIN"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://host:port/", "https:///api/"])
def test_an_address_that_makes_no_sense_fails_the_task_only(
    server: FakeServer, site: Site, tmp_path: Path, url: str
) -> None:
    model = server.add_task()["model"] | {"url": url}
    server.tasks[0]["model"] = model

    assert run(site, server, tmp_path) == {"id": "m"}

    assert server.failures[0]["code"] == "BAD_URL"


def test_a_revoked_token_ends_the_loop(server: FakeServer, site: Site, tmp_path: Path) -> None:
    server.faults["/api/tasks/"] = [refusal(401, "AUTHENTICATION_FAILED")]

    with pytest.raises(AuthenticationFailed, match="Next step"):
        run(site, server, tmp_path)


def test_once_works_off_what_there_is_and_returns(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.ending = {"state": "wait", "retry_after": 60.0, "reason": "others are training"}
    server.add_task(round=0)
    server.add_task(round=1)

    assert run(site, server, tmp_path, once=True) is None

    assert site.fits == 2


AGENT = """
import sys
from pathlib import Path
import fl_client

class Site(fl_client.Client):
    def fit(self, weights, config, context):
        with open(sys.argv[2], "a") as log:
            log.write("fit ")
        return fl_client.FitResult(weights, 5)

fl_client.run(Site(), url=sys.argv[1], token="key", workdir=sys.argv[3])
"""


def test_a_process_killed_while_uploading_sends_the_same_update_when_it_is_back(
    server: FakeServer, tmp_path: Path
) -> None:
    server.add_task()
    arrived, killed = threading.Event(), threading.Event()
    bodies = []

    def upload(asked: Any) -> Reply:
        bodies.append(asked.files["model_file"])
        if len(bodies) > 1:
            return server.contract(asked)
        arrived.set()
        killed.wait(20)
        return Reply(503)

    server.routes["POST", "/api/models/m/"] = upload
    argv = [sys.executable, "-c", AGENT, server.url, str(tmp_path / "log"), str(tmp_path / "w")]
    root = Path(__file__).parents[2]

    first = subprocess.Popen(argv, cwd=root)
    try:
        assert arrived.wait(20)
    finally:
        first.kill()
        first.wait()
        killed.set()
    subprocess.run(argv, cwd=root, check=True, timeout=30)

    assert (tmp_path / "log").read_text() == "fit "
    assert len(server.updates) == 1
    assert bodies[0] == bodies[1]


def test_an_update_that_does_not_count_and_a_bad_end_are_warned_of_once(
    server: FakeServer, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_task()
    held = {"round": 0, "state": "quarantined", "reason": "NORM: far"}
    wait = {"state": "wait", "retry_after": 0, "reason": "held", "own_update": held}
    refused = {**held, "state": "refused"}
    accept, events = server.contract, []

    def upload(asked: Any) -> Reply:
        accept(asked)
        server.faults["/api/tasks/"] = [
            Reply(body=wait),
            Reply(body=wait),
            Reply(body={**wait, "own_update": refused}),
        ]
        return Reply(201, {"detail": "", **held})

    server.routes["POST", "/api/models/m/"] = upload
    ended = {"training": "t", "training_state": "E", "reason": "TOO_FEW"}
    server.ending |= ended

    final = run(site, server, tmp_path, on_event=lambda name, fields: events.append((name, fields)))

    assert final == {"id": "m", **ended}
    assert events[-1] == ("done", final)
    assert [fields for name, fields in events if name in ("refused", "quarantined")] == [
        held,
        refused,
    ]
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == [
        "the update of round 0 is quarantined: NORM: far",
        "the update of round 0 is refused: NORM: far",
        "training t did not complete: TOO_FEW",
    ]


def test_the_next_task_tells_that_the_last_update_was_not_used(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task(round=0)
    server.add_task(round=1, own_updates={"unused": [0], "undecided": []})
    events: list[tuple[str, Any]] = []

    run(site, server, tmp_path, on_event=lambda name, fields: events.append((name, fields)))

    assert [fields["round"] for name, fields in events if name == "refused"] == [0]
