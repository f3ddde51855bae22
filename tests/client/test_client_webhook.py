"""Webhooks: only genuine, fresh, new notifications count, and they are hints."""

import hmac
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fl_client
from fl_client.webhook import Gate, Receiver, sign
from tests.client.conftest import Site
from tests.client.fake_server import Asked, FakeServer, Reply

pytestmark = pytest.mark.enable_socket

SECRET = "s3cret"


def notification(kind: str = "UPDATE_ROUND_START", **body: Any) -> bytes:
    fields = {"notification_type": kind, "training_uuid": "t", "body": body}
    return json.dumps(fields).encode()


def signed(body: bytes, delivery: str = "d-1", age: float = 0.0) -> dict[str, str]:
    timestamp = str(int(time.time() - age))
    return {
        "X-FL-Timestamp": timestamp,
        "X-FL-Delivery": delivery,
        "X-FL-Signature": sign(SECRET, timestamp, body),
    }


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(SECRET, ("127.0.0.1", 0)) as receiver:
        yield receiver


def post(receiver: Receiver, body: bytes, headers: dict[str, str]) -> int:
    host, port = receiver.address
    return httpx.post(
        f"http://{host}:{port}/", content=body, headers=headers, trust_env=False
    ).status_code


def test_a_genuine_notification_is_a_hint(receiver: Receiver) -> None:
    body = notification(round=0, global_model_uuid="m")

    assert post(receiver, body, signed(body)) == 202
    assert receiver.hint.is_set()


def test_the_signature_is_hmac_sha256_over_timestamp_dot_body() -> None:
    expected = hmac.new(b"k", b'1700000000.{"a": 1}', "sha256").hexdigest()

    assert sign("k", "1700000000", b'{"a": 1}') == f"sha256={expected}"


@pytest.mark.parametrize(
    "forge",
    [
        lambda body: signed(body) | {"X-FL-Signature": "sha256=" + "0" * 64},
        lambda body: signed(body) | {"X-FL-Timestamp": "1"},
        lambda body: signed(body + b" "),
        lambda body: signed(body, age=301),
        lambda body: signed(body, age=-400),
        lambda body: {},
        lambda body: {
            "X-FL-Timestamp": "nan",
            "X-FL-Signature": sign(SECRET, "nan", body),
        },
    ],
    ids=["signature", "timestamp", "body", "stale", "future", "unsigned", "nan"],
)
def test_what_is_forged_or_stale_is_refused(receiver: Receiver, forge: Any) -> None:
    body = notification()

    assert post(receiver, body, forge(body)) == 401
    assert not receiver.hint.is_set()


def test_a_replay_is_acknowledged_and_does_nothing(receiver: Receiver) -> None:
    body = notification()
    headers = signed(body)
    post(receiver, body, headers)
    receiver.hint.clear()

    assert post(receiver, body, headers) == 200
    assert post(receiver, body, headers | {"X-FL-Delivery": "another"}) == 200
    assert post(receiver, body, signed(body, age=5)) == 200
    assert not receiver.hint.is_set()


def test_an_unknown_type_is_acknowledged_and_does_nothing(receiver: Receiver) -> None:
    body = notification("COFFEE_BREAK")

    assert post(receiver, body, signed(body)) == 200
    assert not receiver.hint.is_set()


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b"\xff"])
def test_a_signed_body_that_is_no_notification_is_refused(body: bytes) -> None:
    headers = signed(body)

    status = Gate(SECRET).check(
        headers["X-FL-Timestamp"], headers["X-FL-Delivery"], headers["X-FL-Signature"], body
    )

    assert status == 400


def test_a_body_too_large_is_refused_unread(receiver: Receiver) -> None:
    host, port = receiver.address

    with httpx.Client(trust_env=False) as http:
        response = http.post(f"http://{host}:{port}/", content=bytes(64 * 1024 + 1))

    assert response.status_code == 413


def test_duplicates_train_once_a_round_and_the_end_is_noticed(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.ending = {"state": "wait", "retry_after": 2.0, "reason": "not started"}
    listening: list[tuple[str, int]] = []
    idle, rested = threading.Event(), threading.Event()
    final: list[Any] = []

    def on_event(name: str, fields: dict[str, Any]) -> None:
        if name == "listening":
            listening.append(fields["address"])
            idle.set()

    def tasks(asked: Asked) -> Reply:
        reply = server.contract(asked)
        if site.fits and not server.tasks:
            rested.set()  # this answer is "wait" still
        return reply

    server.routes["GET", "/api/tasks/"] = tasks

    def participate() -> None:
        final.append(
            fl_client.run(
                site,
                url=server.url,
                token="key",
                mode="webhook",
                listen=("127.0.0.1", 0),
                workdir=tmp_path,
                on_event=on_event,
            )
        )

    def notify(kind: str, delivery: str) -> int:
        body = notification(kind, round=0, global_model_uuid="m")
        host, port = listening[0]
        return httpx.post(
            f"http://{host}:{port}/",
            content=body,
            headers=signed(body, delivery),
            trust_env=False,
        ).status_code

    agent = threading.Thread(target=participate)
    agent.start()
    assert idle.wait(10)
    server.add_task()
    assert notify("UPDATE_ROUND_START", "d-1") == 202
    assert notify("UPDATE_ROUND_START", "d-1") == 200
    assert rested.wait(10)
    server.ending = {"state": "done", "final_model": {"id": "m"}}
    assert notify("TRAINING_FINISHED", "d-2") == 202
    agent.join(10)

    assert final == [{"id": "m"}]
    assert site.fits == 1
    assert {q for a in server.seen("/api/tasks/") for q in a.query["wait"]} == {"0"}


def test_a_site_can_be_stopped_while_it_listens(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.ending = {"state": "wait", "retry_after": 2.0, "reason": ""}
    stop, asked = threading.Event(), threading.Event()

    def wait(request: Asked) -> Reply:
        asked.set()
        return Reply(body=server.ending)

    server.routes["GET", "/api/tasks/"] = wait
    agent = threading.Thread(
        target=lambda: fl_client.run(
            site,
            url=server.url,
            token="key",
            mode="webhook",
            listen=("127.0.0.1", 0),
            workdir=tmp_path,
            stop=stop,
        )
    )
    agent.start()
    assert asked.wait(10)
    stop.set()
    agent.join(10)

    assert not agent.is_alive()
