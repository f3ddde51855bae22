"""Webhook messages: what is sent, where it may go, in which order, and what follows from a refusal."""

import hashlib
import hmac
import ipaddress
import json
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import trustme
from django.db import connection
from django.utils import timezone

from fl_client.webhook import Gate
from fl_server.settings.env import BadSetting, Places, env_places
from fl_server_ai import dispatch
from fl_server_ai.notifications import delivery, guard, turns
from fl_server_ai.notifications.transports import (
    TRANSPORTS,
    Message,
    Rejected,
    Unreachable,
    https,
)
from fl_server_ai.services.notifications import notifications_deliver
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_ai.trainer import tasks
from fl_server_core.lifecycle import NotificationState, RoundPhase, TaskState, TrainingState, move
from fl_server_core.models import Notification, Round, Task, TrainerEvent, User
from fl_server_core.services.tokens import webhook_secret
from fl_server_core.services.trainings import training_add_clients
from tests.ai.test_policy_joining import announced, provide
from tests.endpoints import Behave, Endpoint, answering, hanging_up
from tests.scenes import Scene, scene

in_database = pytest.mark.django_db(transaction=True)


@pytest.fixture
def endpoint(settings: Any) -> Iterator[Endpoint]:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = True
    found = Endpoint()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for everybody, on a slow machine too."""
    monkeypatch.setattr(delivery, "PATIENCE", 60.0)


def deliver(url: str, body: bytes = b"{}") -> int:
    return TRANSPORTS[url.split(":")[0]]().deliver(Message(url, body, {"X-Test": "yes"}))


def send_all() -> int:
    """Deliver as the executors do, whatever the pauses between attempts are."""
    Notification.objects.filter(state=NotificationState.QUEUED).update(
        next_attempt_at=timezone.now()
    )
    return notifications_deliver()


def paths_apart(told: Scene, endpoint: Endpoint) -> None:
    """Give every site a path of its own, after its name."""
    for name, user in told.sites.items():
        User.objects.filter(pk=user.pk).update(
            message_endpoint=f"http://127.0.0.1:{endpoint.port}/{name}"
        )


def of(told: Scene, site: str, type: str) -> Notification:
    return Notification.objects.get(receiver=told.sites[site], type=type)


# --- what is sent -----------------------------------------------------------------------------


@in_database
def test_a_message_has_the_fields_of_the_wire_contract_and_a_signature_over_its_bytes(
    endpoint: Endpoint,
) -> None:
    told = scene("ada", endpoint=endpoint.url)

    notifications_deliver()

    path, headers, raw = endpoint.requests[1]
    row = of(told, "ada", "UPDATE_ROUND_START")
    task = told.task("ada")
    deadline = told.round.deadline
    assert deadline is not None
    assert path == "/hook"
    assert json.loads(raw) == {
        "notification_type": "UPDATE_ROUND_START",
        "training_uuid": str(told.training.pk),
        "body": {"round": 0, "global_model_uuid": str(told.training.model_id)},
        "delivery_id": str(row.delivery_id),
        "task_id": str(task.pk),
        "deadline": deadline.isoformat(),
    }
    assert headers["Content-Type"] == "application/json"
    assert headers["X-FL-Delivery"] == str(row.delivery_id)
    signed = headers["X-FL-Timestamp"].encode() + b"." + raw
    secret = webhook_secret(user=told.sites["ada"]).encode()
    assert headers["X-FL-Signature"] == (
        "sha256=" + hmac.new(secret, signed, hashlib.sha256).hexdigest()
    )
    assert (row.state, row.last_status, row.attempt) == ("delivered", 200, 1)


@in_database
def test_who_is_to_give_the_weights_is_told_where_to_send_them(endpoint: Endpoint) -> None:
    told = announced("ada", endpoint=endpoint.url)

    notifications_deliver()

    task = told.task("ada", "initial_weights")
    _, asked = endpoint.messages()
    assert endpoint.types() == ["TRAINING_START", "INITIAL_WEIGHTS"]
    assert asked["body"] == {"round": 0, "global_model_uuid": str(told.training.model_id)}
    assert (asked["task_id"], asked["upload_url"]) == (
        str(task.pk),
        f"/api/tasks/{task.pk}/result/",
    )
    provide(told, "ada")
    notifications_deliver()
    assert endpoint.types()[2:] == ["UPDATE_ROUND_START"]


@in_database
def test_who_does_not_know_the_message_about_weights_is_followed_by_another(
    endpoint: Endpoint,
) -> None:
    told = announced("ada", "grace", endpoint=endpoint.url)
    paths_apart(told, endpoint)
    first = told.round.tasks.get().user.username
    (second,) = {"ada", "grace"} - {first}

    def unknown(handler: BaseHTTPRequestHandler) -> None:
        known = endpoint.types(f"/{first}")[-1] != "INITIAL_WEIGHTS"
        answering(200 if known else 400)(handler)

    endpoint.at = {f"/{first}": unknown}

    notifications_deliver()

    assert told.task(first, "initial_weights").failure == "REJECTED: answered 400"
    assert endpoint.types(f"/{second}") == ["TRAINING_START", "INITIAL_WEIGHTS"]


@in_database
def test_every_receiver_has_a_secret_of_its_own(endpoint: Endpoint) -> None:
    told = scene(endpoint=endpoint.url)

    assert webhook_secret(user=told.sites["ada"]) != webhook_secret(user=told.sites["grace"])


# --- where it may go --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 202, 204])
def test_any_success_is_a_delivery(endpoint: Endpoint, status: int) -> None:
    endpoint.behave = answering(status)

    assert deliver(endpoint.url) == status


@pytest.mark.parametrize("status", [400, 404, 410, 500, 503])
def test_any_other_status_is_a_rejection(endpoint: Endpoint, status: int) -> None:
    endpoint.behave = answering(status)

    with pytest.raises(Rejected) as caught:
        deliver(endpoint.url)

    assert caught.value.status == status


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_rejections_and_nobody_follows_them(endpoint: Endpoint, status: int) -> None:
    endpoint.behave = answering(status, Location=f"http://127.0.0.1:{endpoint.port}/elsewhere")

    with pytest.raises(Rejected) as caught:
        deliver(endpoint.url)

    assert caught.value.status == status
    assert [path for path, _, _ in endpoint.requests] == ["/hook"]


def test_an_endpoint_that_never_answers_is_unreachable(endpoint: Endpoint, settings: Any) -> None:
    settings.FL_WEBHOOK_READ_SECONDS = 0.2
    endpoint.behave = lambda handler: void(endpoint.release.wait(30))

    with pytest.raises(Unreachable, match="ReadTimeout"):
        deliver(endpoint.url)


def void(_: object) -> None:
    """For lambdas that must return nothing."""


def ignored(*_: object) -> None:
    """Hears of something, and does nothing."""


def test_an_endpoint_that_drips_is_cut_off(endpoint: Endpoint, settings: Any) -> None:
    """Each byte comes within the read timeout; the whole answer never would."""
    settings.FL_WEBHOOK_CONNECT_SECONDS = settings.FL_WEBHOOK_READ_SECONDS = 0.3

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not endpoint.release.wait(0.05):
            handler.wfile.write(b"z")

    endpoint.behave = drip

    with pytest.raises(Unreachable, match="Timeout"):
        deliver(endpoint.url)


def test_an_endless_answer_is_a_delivery_of_which_little_is_read(endpoint: Endpoint) -> None:
    sent: list[int] = []

    def gush(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not endpoint.release.is_set():
            sent.append(handler.wfile.write(bytes(65_536)))

    endpoint.behave = gush

    assert deliver(endpoint.url) == 200


def test_an_endpoint_that_hangs_up_is_unreachable(endpoint: Endpoint) -> None:
    endpoint.behave = hanging_up

    with pytest.raises(Unreachable):
        deliver(endpoint.url)


def test_a_port_where_nobody_listens_is_unreachable(settings: Any) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = True
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    with pytest.raises(Unreachable, match="ConnectError"):
        deliver(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "017700000001", "127.1",
        "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]",
        "[64:ff9b::7f00:1]", "[fe80::1%251]", "[2002:7f00:1::]",
    ],
)  # fmt: skip
def test_loopback_is_refused_and_nothing_connects(
    endpoint: Endpoint, settings: Any, host: str
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False

    with pytest.raises(Rejected, match="ADDRESS_REFUSED") as caught:
        deliver(f"http://{host}:{endpoint.port}/hook")

    assert endpoint.connections == 0
    assert f"{host} is {host}" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::7f00:1",
        "2002:0a00:0001::1",
        "2001::1",
        "2001:db8::1",
        "3fff::1",
        "fc00::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff0e::1",
    ],
)
def test_addresses_off_the_internet_are_refused(address: str) -> None:
    assert not guard.is_public(address)


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"],
)
def test_addresses_on_the_internet_are_not(address: str) -> None:
    assert guard.is_public(address)


@pytest.mark.parametrize(
    ("allowed", "host", "address"),
    [
        ("10.2.0.0/16", "any.example", "10.2.3.4"),
        ("10.2.3.4", "any.example", "::ffff:10.2.3.4"),
        ("fd00::/8", "any.example", "fd00::1"),
        ("[fd00::1]", "any.example", "fd00::1"),
        ("169.254.0.0/16", "any.example", "169.254.7.7"),
        ("hooks.example", "Hooks.Example.", "10.2.3.4"),
        (".example", "hooks.example", "192.168.0.1"),
        ("other.example\n10.0.0.0/8", "any.example", "10.2.3.4"),
    ],
)
def test_what_the_operator_lists_is_allowed(
    monkeypatch: pytest.MonkeyPatch, settings: Any, allowed: str, host: str, address: str
) -> None:
    monkeypatch.setenv("FL_WEBHOOK_ALLOW", allowed)
    settings.FL_WEBHOOK_ALLOW = env_places("FL_WEBHOOK_ALLOW", "")

    assert guard.is_allowed(host, address)


@pytest.mark.parametrize(
    ("allowed", "host", "address"),
    [
        ("", "hooks.example", "10.2.3.4"),
        ("10.2.0.0/16", "hooks.example", "10.3.0.1"),
        ("10.2.0.0/16", "hooks.example", "64:ff9b::10.2.3.4"),
        ("hooks.example", "evil-hooks.example", "10.2.3.4"),
        ("hooks.example", "hooks.example.evil.test", "10.2.3.4"),
        (".example", "evilexample", "10.2.3.4"),
        ("hooks.example", "hooks.example", "169.254.169.254"),
        ("hooks.example", "hooks.example", "fe80::1%eth0"),
        ("0.0.0.0/0,::/0", "hooks.example", "0.0.0.0"),  # noqa: S104
        ("0.0.0.0/0,::/0", "hooks.example", "224.0.0.1"),
    ],
)
def test_what_the_operator_does_not_list_is_not(
    monkeypatch: pytest.MonkeyPatch, settings: Any, allowed: str, host: str, address: str
) -> None:
    monkeypatch.setenv("FL_WEBHOOK_ALLOW", allowed)
    settings.FL_WEBHOOK_ALLOW = env_places("FL_WEBHOOK_ALLOW", "")

    assert not guard.is_allowed(host, address)


@pytest.mark.parametrize("value", ["10.2.0.0/33", "https://hooks.example", "1.2.3", "a,*"])
def test_a_list_that_cannot_be_read_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FL_WEBHOOK_ALLOW", value)

    with pytest.raises(BadSetting, match="set it to networks"):
        env_places("FL_WEBHOOK_ALLOW", "where webhooks may go")


def test_a_listed_network_is_delivered_to_and_nothing_else_private(
    endpoint: Endpoint, settings: Any
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False
    settings.FL_WEBHOOK_ALLOW = Places((ipaddress.ip_network("127.0.0.1/32"),))

    assert deliver(endpoint.url) == 200
    with pytest.raises(Rejected, match="ADDRESS_REFUSED"):
        deliver(f"http://[::1]:{endpoint.port}/hook")
    assert endpoint.connections == 1


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names resolve to the answers one after the other; returns where connections are tried."""
    left = iter(answers)
    tried: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in next(left)]

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        tried.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


def test_a_name_that_changes_its_mind_is_connected_where_it_was_checked(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False
    tried = resolving(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])

    with pytest.raises(Unreachable):
        deliver("http://rebind.example/hook")

    assert tried == ["93.184.216.34"]


def test_one_private_address_among_several_refuses_the_name(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False
    tried = resolving(monkeypatch, ["93.184.216.34", "10.0.0.1"])

    with pytest.raises(Rejected, match=r"ADDRESS_REFUSED: mixed\.example is 10\.0\.0\.1"):
        deliver("http://mixed.example/hook")

    assert tried == []


def test_the_next_address_is_tried_when_one_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False
    tried = resolving(monkeypatch, ["93.184.216.34", "93.184.216.35"])

    with pytest.raises(Unreachable):
        deliver("http://two.example/hook")

    assert tried == ["93.184.216.34", "93.184.216.35"]


def test_a_resolver_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_WEBHOOK_CONNECT_SECONDS = 0.1
    release = threading.Event()

    def resolve(*_: Any, **__: Any) -> list[Any]:
        release.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    with pytest.raises(Unreachable, match="not resolved in time"):
        deliver("http://slow.example/hook")
    release.set()


def test_a_name_that_nobody_knows_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    with pytest.raises(Unreachable, match="has no address"):
        deliver("http://nowhere.example/hook")


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + ".example/", "http://bücher.example/"])
def test_what_is_no_host_name_is_rejected(url: str) -> None:
    with pytest.raises(Rejected, match="BAD_ENDPOINT"):
        deliver(url)


def test_proxies_of_the_environment_are_not_used(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    assert deliver(endpoint.url) == 200


@pytest.mark.parametrize("name", ["hooks.example", "other.example"])
def test_tls_is_checked_against_the_name_although_the_address_is_dialled(
    monkeypatch: pytest.MonkeyPatch, settings: Any, name: str
) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = True
    authority = trustme.CA()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    monkeypatch.setattr(https, "tls", lambda: trusting)
    asked: list[str | None] = []
    serving.sni_callback = lambda _socket, host, _context: asked.append(host)
    found = Endpoint(serving)
    at_home = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", found.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: at_home)

    try:
        if name == "hooks.example":
            assert deliver(f"https://{name}:{found.port}/hook") == 200
        else:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                deliver(f"https://{name}:{found.port}/hook")
    finally:
        found.close()

    assert asked == [name]


# --- in which order ---------------------------------------------------------------------------


@in_database
def test_the_start_of_the_training_arrives_before_the_start_of_its_round(
    endpoint: Endpoint,
) -> None:
    told = scene(endpoint=endpoint.url)
    paths_apart(told, endpoint)

    assert notifications_deliver() == 4

    for name in told.sites:
        assert endpoint.types(f"/{name}") == ["TRAINING_START", "UPDATE_ROUND_START"]
    assert told.round.phase == RoundPhase.COLLECTING


@in_database
def test_a_later_message_waits_for_an_earlier_one_that_is_tried_again(endpoint: Endpoint) -> None:
    told = scene("ada", endpoint=endpoint.url)
    endpoint.behave = hanging_up

    assert notifications_deliver() == 1
    assert notifications_deliver() == 0  # its pause isn't over
    assert told.round.phase == RoundPhase.NOTIFYING
    endpoint.behave = answering(200)
    assert send_all() == 2

    assert endpoint.types() == ["TRAINING_START", "TRAINING_START", "UPDATE_ROUND_START"]
    assert endpoint.messages()[0]["delivery_id"] == endpoint.messages()[1]["delivery_id"]


@dataclass
class Waiting:
    """Receivers that answer when somebody else was told that the round begins; `saw` if they lived to see it."""

    endpoint: Endpoint
    told: str
    served: threading.Event = field(default_factory=threading.Event)
    saw: list[bool] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)  # how many were waiting, one more included
    now: int = 0

    def hanging(self, handler: BaseHTTPRequestHandler) -> None:
        self.now += 1
        self.at_once.append(self.now)
        self.saw.append(self.served.wait(20))
        self.now -= 1
        answering(200)(handler)

    def quick(self, handler: BaseHTTPRequestHandler) -> None:
        answering(200)(handler)
        if self.endpoint.types(f"/{self.told}")[-1] == "UPDATE_ROUND_START":
            self.served.set()


def waiting_for(told: Scene, endpoint: Endpoint, name: str) -> Waiting:
    """Everybody hangs, each at a path of its own, until this site was told."""
    paths_apart(told, endpoint)
    found = Waiting(endpoint, name)
    endpoint.behave, endpoint.at = found.hanging, {f"/{name}": found.quick}
    return found


def before(told: Scene, *sites: str, state: NotificationState) -> None:
    """What became of the last message to these sites."""
    for site in sites:
        Notification.objects.create(
            training=told.training, receiver=told.sites[site], type="CLIENT_REMOVED", state=state,
            finished_at=timezone.now(),
        )  # fmt: skip


@in_database
def test_an_endpoint_that_hangs_delays_nobody_else(endpoint: Endpoint, settings: Any) -> None:
    settings.FL_WEBHOOK_READ_SECONDS = 60.0
    away = waiting_for(scene(endpoint=endpoint.url), endpoint, "grace")

    notifications_deliver()

    assert away.saw == [True, True]


@in_database
@pytest.mark.parametrize("known", ["tried before", "did not answer", "never told", "one in many"])
def test_who_is_away_delays_nobody_who_is_there(
    endpoint: Endpoint, settings: Any, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """More of them than there are threads, and none of them is given up while the other is told."""
    settings.FL_WEBHOOK_READ_SECONDS = 60.0
    monkeypatch.setattr(delivery, "THREADS", 8)
    monkeypatch.setattr(delivery, "KEPT_FREE", 2)
    dead = ["dead"] if known == "one in many" else [f"dead-{n}" for n in range(10)]
    told = scene(*dead, "grace", endpoint=endpoint.url)
    away = waiting_for(told, endpoint, "grace")
    if known == "tried before":
        Notification.objects.exclude(receiver=told.sites["grace"]).update(attempt=1)
    elif known == "did not answer":
        before(told, *dead, state=NotificationState.FAILED)
    elif known == "never told":
        before(told, "grace", state=NotificationState.DELIVERED)
    else:
        mine = Notification.objects.get(receiver=told.sites["dead"], type="TRAINING_START")
        for number in range(10):  # earlier ones, as of other trainings
            also_in_another_training(told, mine, number)

    notifications_deliver()

    assert len(away.saw) >= len(dead)
    assert all(away.saw)
    assert max(away.at_once) <= (1 if known == "one in many" else 6)


def also_in_another_training(told: Scene, message: Notification, number: int) -> None:
    training, model = told.now, told.now.model
    version = model.current_version
    model.pk, model.current_version = None, None
    model.save()
    training.pk, training.model = None, model
    training.save()
    assert version is not None
    message.pk, message.training = -1 - number, training
    message.delivery_id = uuid.uuid4()
    message.save(force_insert=True)


@in_database
def test_forty_who_were_never_told_anything_and_hang_do_not_delay_the_next(
    endpoint: Endpoint, settings: Any
) -> None:
    settings.FL_WEBHOOK_READ_SECONDS = 60.0
    dead = [f"dead-{n}" for n in range(40)]
    away = waiting_for(scene(*dead, "grace", endpoint=endpoint.url), endpoint, "grace")

    notifications_deliver()

    assert len(away.saw) >= len(dead)
    assert all(away.saw)


@in_database
def test_a_call_leaves_behind_who_hangs_and_hears_of_it_later(
    endpoint: Endpoint, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_WEBHOOK_READ_SECONDS = 60.0
    monkeypatch.setattr(delivery, "PATIENCE", 0.2)
    told = scene(endpoint=endpoint.url)
    away = waiting_for(told, endpoint, "nobody")
    hinted = threading.Event()
    monkeypatch.setitem(dispatch._senders, "none", lambda *_: hinted.set())

    notifications_deliver()
    again = notifications_deliver()
    sent = list(away.saw)
    away.served.set()

    assert hinted.wait(20)
    assert (again, sent) == (0, [])
    until_nobody_is_told()
    monkeypatch.setattr(delivery, "PATIENCE", 60.0)
    notifications_deliver()
    assert set(Notification.objects.values_list("state", "attempt")) == {("delivered", 1)}
    assert told.round.phase == RoundPhase.COLLECTING


def until_nobody_is_told() -> None:
    while delivery._away:
        time.sleep(0.01)


@in_database
def test_of_hundreds_of_messages_the_next_call_sends_the_rest(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(*(f"site-{i}" for i in range(3)), endpoint=endpoint.url)
    hints: list[str] = []
    monkeypatch.setitem(dispatch._senders, "none", lambda task, _: hints.append(task))
    monkeypatch.setattr(tasks, "AT_A_TIME", 6)

    tasks.deliver_notifications()
    tasks.deliver_notifications()

    assert hints == [dispatch.DELIVER]
    assert len(endpoint.requests) == 6


@in_database
def test_two_deliverers_send_each_message_once(endpoint: Endpoint) -> None:
    scene(*(f"site-{i}" for i in range(10)), endpoint=endpoint.url)
    start = threading.Barrier(2)
    attempted: list[int] = []

    def work() -> None:
        start.wait()
        attempted.append(notifications_deliver())
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notifications_deliver()

    ids = [message["delivery_id"] for message in endpoint.messages()]
    assert len(ids) == len(set(ids)) == 20
    assert set(Notification.objects.values_list("state", "attempt")) == {("delivered", 1)}


@in_database
def test_the_limit_is_kept(endpoint: Endpoint) -> None:
    scene(*(f"site-{i}" for i in range(10)), endpoint=endpoint.url)

    assert delivery.deliver_due(on_gone=ignored, on_late=ignored, limit=3) == 3

    assert len(endpoint.requests) == 3


@in_database
def test_a_message_that_is_due_waits_for_the_one_before_it(endpoint: Endpoint) -> None:
    scene("ada", endpoint=endpoint.url)
    later = timezone.now() + timedelta(minutes=3)

    Notification.objects.filter(type="TRAINING_START").update(next_attempt_at=later)

    assert turns.turns((), threads=64, kept=16, most=64) == []
    Notification.objects.filter(type="TRAINING_START").delete()
    assert len(turns.turns((), threads=64, kept=16, most=64)) == 1


# --- what follows -----------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", range(1, 20))
def test_pauses_double_from_five_seconds_to_five_minutes(attempt: int) -> None:
    middle = min(5 * 2 ** (attempt - 1), 300)

    seconds = delivery.pause(attempt).total_seconds()

    assert 0.8 * middle <= seconds <= 1.2 * middle


@in_database
def test_a_client_that_rejects_its_task_is_left_out_and_the_round_goes_on(
    endpoint: Endpoint,
) -> None:
    told = scene(endpoint=endpoint.url)
    paths_apart(told, endpoint)
    told.send("ada", 1.0)
    endpoint.at = {"/grace": answering(403)}

    notifications_deliver()

    grace = told.task("grace")
    assert (grace.state, grace.failure) == (TaskState.FAILED, "REJECTED: answered 403")
    assert of(told, "grace", "UPDATE_ROUND_START").last_status == 403
    assert told.round.phase == RoundPhase.AGGREGATING
    assert TrainerEvent.objects.get().type == "TrainingRoundFinished"


@in_database
def test_a_training_whose_clients_all_reject_ends_with_a_reason(endpoint: Endpoint) -> None:
    told = scene(endpoint=endpoint.url)
    endpoint.behave = answering(500)

    notifications_deliver()

    assert told.now.state == TrainingState.ERROR
    assert told.now.reason.startswith("NOT_ENOUGH_UPDATES")


@in_database
def test_a_refused_address_is_a_rejection_that_says_so(endpoint: Endpoint, settings: Any) -> None:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = False
    told = scene(endpoint=endpoint.url)

    notifications_deliver()

    assert told.task("ada").failure.startswith("REJECTED: ADDRESS_REFUSED: 127.0.0.1")
    assert endpoint.connections == 0


@in_database
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://127.0.0.1/hook", "nothing delivers to 'ftp'"),
        ("http://[x", "Invalid IPv6 URL"),
    ],
)
def test_an_endpoint_that_is_no_web_address_is_a_rejection(
    endpoint: Endpoint, url: str, said: str
) -> None:
    told = scene(endpoint=url)

    notifications_deliver()

    assert told.task("ada").failure == f"REJECTED: BAD_ENDPOINT: {said}"


@in_database
def test_an_unreachable_client_is_given_up_after_the_last_attempt(
    endpoint: Endpoint, settings: Any
) -> None:
    settings.FL_WEBHOOK_ATTEMPTS = 2
    told = scene(endpoint=endpoint.url)
    paths_apart(told, endpoint)
    told.send("ada", 1.0)
    endpoint.at = {"/grace": hanging_up}

    states = []
    for _ in range(3):
        send_all()
        states.append(told.task("grace").state)

    assert states == [TaskState.OPEN, TaskState.OPEN, TaskState.FAILED]
    assert told.task("grace").failure.startswith("UNREACHABLE: ")
    assert of(told, "grace", "UPDATE_ROUND_START").state == NotificationState.FAILED
    assert told.round.phase == RoundPhase.AGGREGATING


@in_database
@pytest.mark.parametrize("behave", [hanging_up, answering(500)])
def test_a_client_that_polls_keeps_its_task_whatever_its_webhook_says(
    endpoint: Endpoint, settings: Any, behave: Behave
) -> None:
    settings.FL_WEBHOOK_ATTEMPTS = 1
    told = scene("ada", endpoint=endpoint.url)
    Task.objects.update(fetched_at=timezone.now())
    endpoint.behave = behave

    notifications_deliver()

    assert told.task("ada").state == TaskState.OPEN
    assert not Notification.objects.filter(state=NotificationState.QUEUED).exists()
    assert told.round.phase == RoundPhase.COLLECTING


@in_database
def test_a_message_about_a_task_that_is_over_is_not_sent(endpoint: Endpoint) -> None:
    told = scene("ada", endpoint=endpoint.url)
    move(told.task("ada"), TaskState.CANCELLED)

    notifications_deliver()

    row = of(told, "ada", "UPDATE_ROUND_START")
    assert endpoint.types() == ["TRAINING_START"]
    assert (row.state, row.last_error) == (NotificationState.FAILED, "obsolete")


@in_database
def test_a_message_whose_senders_were_killed_each_time_is_given_up(
    endpoint: Endpoint, settings: Any
) -> None:
    told = scene("ada", endpoint=endpoint.url)
    Notification.objects.update(attempt=settings.FL_WEBHOOK_ATTEMPTS)

    notifications_deliver()

    assert endpoint.requests == []
    assert told.task("ada").failure == "UNREACHABLE: no attempt came to its end"


@in_database
def test_a_killed_sender_does_not_keep_its_message(endpoint: Endpoint) -> None:
    scene("ada", endpoint=endpoint.url)
    first = Notification.objects.order_by("id").first()
    assert first is not None
    assert turns.claim(first.pk)

    assert notifications_deliver() == 0
    assert send_all() == 2

    assert endpoint.types() == ["TRAINING_START", "UPDATE_ROUND_START"]


@in_database
def test_a_task_that_could_not_be_ended_is_ended_at_the_next_attempt(
    endpoint: Endpoint,
) -> None:
    told = scene("ada", endpoint=endpoint.url)
    endpoint.behave = answering(500)

    def broken(*_: object) -> None:
        raise RuntimeError("killed here")

    delivery.deliver_due(on_gone=broken, on_late=ignored)
    assert told.task("ada").state == TaskState.OPEN
    send_all()

    assert told.task("ada").state == TaskState.FAILED


@in_database
def test_a_message_that_cannot_be_made_stops_no_other(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scene(endpoint=endpoint.url)
    paths_apart(told, endpoint)
    make = delivery.message_of

    def message_of(notification: Notification, url: str) -> Message:
        if notification.receiver_id == told.sites["ada"].pk:
            raise RuntimeError("a bug")
        return make(notification, url)

    monkeypatch.setattr(delivery, "message_of", message_of)

    notifications_deliver()

    assert endpoint.types("/grace") == ["TRAINING_START", "UPDATE_ROUND_START"]
    assert of(told, "ada", "TRAINING_START").state == NotificationState.QUEUED


@in_database
def test_a_round_whose_messages_were_settled_by_a_killed_process_is_collecting(
    endpoint: Endpoint,
) -> None:
    told = scene("ada", endpoint=endpoint.url)
    Notification.objects.update(state=NotificationState.DELIVERED)
    assert Round.objects.get().phase == RoundPhase.NOTIFYING

    assert notifications_deliver() == 0

    assert told.round.phase == RoundPhase.COLLECTING


@in_database
def test_the_client_package_accepts_a_message_once(endpoint: Endpoint) -> None:
    told = scene("ada", endpoint=endpoint.url)

    notifications_deliver()

    gate = Gate(webhook_secret(user=told.sites["ada"]))
    stranger = Gate("another secret")
    for _, headers, raw in endpoint.requests:
        signed = (headers["X-FL-Timestamp"], headers["X-FL-Delivery"], headers["X-FL-Signature"])
        assert stranger.check(*signed, raw) == 401
        assert gate.check(*signed, raw + b" ") == 401
        assert [gate.check(*signed, raw), gate.check(*signed, raw)] == [202, 200]


@in_database
def test_an_unreachable_receiver_is_tried_again_after_growing_pauses(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scene("ada", endpoint=endpoint.url)
    endpoint.behave = hanging_up
    monkeypatch.setattr(delivery.random, "uniform", lambda _low, _high: 1.0)

    for seconds in (5, 10, 20):
        before = timezone.now()
        send_all()
        row, after = of(told, "ada", "TRAINING_START"), timezone.now()
        assert before <= row.next_attempt_at - timedelta(seconds=seconds) <= after
        assert row.state == NotificationState.QUEUED
        assert row.last_error


@in_database
def test_no_pause_is_slept_through(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    scene("ada", endpoint=endpoint.url)
    endpoint.behave = hanging_up
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    assert notifications_deliver() == 1

    assert slept == []


@pytest.mark.django_db
def test_who_is_removed_twice_hears_of_it_twice() -> None:
    told = scene("ada", "grace", endpoint="https://site.example/hook")
    ada, grace = told.sites["ada"], told.sites["grace"]

    def change(act: Callable[..., None], *users: User) -> None:
        act(training=told.training, user=told.actor, clients=[user.pk for user in users])

    for _ in range(3):
        change(training_clients_remove, ada)
        change(training_clients_remove, ada)  # is out already: no news
        change(training_add_clients, ada)
    change(training_clients_remove, ada, grace)

    rows = Notification.objects.filter(type="CLIENT_REMOVED")
    assert (rows.filter(receiver=ada).count(), rows.filter(receiver=grace).count()) == (4, 1)
    assert all("round" not in row.body and row.step < 0 for row in rows)
