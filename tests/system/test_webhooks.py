"""Sites that are told by webhook, on a real server: one that is away delays nobody but itself."""

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from safetensors.numpy import save

from fl_client.webhook import Gate
from tests.endpoints import Endpoint, answering
from tests.system.processes import until
from tests.system.servers import free_port
from tests.system.sites import checked, http, model, register
from tests.system.test_embedded import Embedded

pytestmark = pytest.mark.system


class Told:
    """A site that does what its messages say, and asks for nothing."""

    def __init__(self, base: str, name: str, port: int) -> None:
        self.port = port
        hook = f"http://127.0.0.1:{port}/{name}"
        self.id, self.token = register(base, name, client=True, message_endpoint=hook)
        with http(base, self.token) as me:
            secret = checked(me.post("/api/users/myself/webhook-secret/"), 200)["webhook_secret"]
        self.base, self.gate = base, Gate(secret)
        self.known: list[int] = []  # what the SDK's own check says of each delivery
        self.meanwhile: Callable[[], int] = lambda: 0
        self.saw: list[int] = []  # what that was, at each delivery
        self.answers_lost = 0  # of so many deliveries, the first ones, the server never hears

    def listen(self) -> None:
        self.endpoint = Endpoint(port=self.port)
        self.endpoint.behave = self._hear

    def _hear(self, handler: BaseHTTPRequestHandler) -> None:
        self.saw.append(self.meanwhile())
        _, headers, raw = self.endpoint.requests[-1]
        signed = (headers["X-FL-Timestamp"], headers["X-FL-Delivery"], headers["X-FL-Signature"])
        self.known.append(self.gate.check(*signed, raw))
        if len(self.known) > self.answers_lost:
            answering(self.known[-1])(handler)

    def hear_out(self) -> None:
        """Wait for the last message, and close."""
        until(lambda: "TRAINING_FINISHED" in self.endpoint.types(), "the last message")
        until(lambda: len(self.known) == len(self.endpoint.requests), "its answer")
        self.endpoint.close()

    def rounds(self) -> list[int]:
        """The rounds that it was asked to take part in, as far as it was told."""
        return [
            message["body"]["round"]
            for message in self.endpoint.messages()
            if message["notification_type"] == "UPDATE_ROUND_START"
        ]

    def send(self, message: dict[str, Any]) -> httpx.Response:
        with http(self.base, self.token) as me:
            return me.post(
                f"/api/models/{message['global_model_uuid']}/",
                data={"round": message["round"], "sample_size": "3"},
                files={"model_file": save(model(10))},
            )

    def answer(self, round: int) -> httpx.Response:
        """Wait until it is asked for this round, and send its update."""
        until(lambda: round in self.rounds(), f"round {round} at port {self.port}", 200)
        asked = next(
            message["body"]
            for message in self.endpoint.messages()
            if message["notification_type"] == "UPDATE_ROUND_START"
            and message["body"]["round"] == round
        )
        return self.send(asked)


class Abyss(Endpoint):
    """A site that takes messages, and never answers; `given_up` counts senders who had enough."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.behave = self._swallow
        self.given_up = 0
        self.site, _ = register(base, "lost", client=True, message_endpoint=self.url)

    def _swallow(self, handler: BaseHTTPRequestHandler) -> None:
        handler.connection.recv(1)
        self.given_up += 1


def train(researcher: httpx.Client, clients: list[str], **options: Any) -> str:
    """Start a training of three rounds with a model of its own; its URL."""
    uploaded = researcher.post(
        "/api/models/",
        data={"name": "m", "description": "d"},
        files={"model_file": save(model(10))},
    )
    wanted = {
        "model_id": checked(uploaded, 201)["model_id"],
        "target_num_updates": 3,
        "aggregation_method": "FedAvg",
        "metric_names": [],
        "clients": clients,
        "options": {"skip_model_tests": True, **options},
    }
    made = checked(researcher.post("/api/trainings/", json=wanted), 201)
    training = f"/api/trainings/{made['training_id']}/"
    checked(researcher.post(f"{training}start/"), 202)
    return training


@pytest.mark.parametrize(
    ("pause", "seconds"), [(1, 0), pytest.param(5, 30, marks=pytest.mark.heavy, id="30 s")]
)
def test_an_endpoint_that_is_down_delays_its_own_site_only(
    tmp_path: Path, pause: int, seconds: float
) -> None:
    embedded = Embedded(tmp_path)
    allowed = {"FL_WEBHOOK_ALLOW": "127.0.0.1", "FL_WEBHOOK_PAUSE": str(pause)}
    with embedded.serving(**allowed) as server:
        abyss = Abyss(embedded.base)
        ada, grace, mary = (
            Told(embedded.base, name, free_port()) for name in ("ada", "grace", "mary")
        )
        _, actor = register(embedded.base, "researcher", actor=True)
        with http(embedded.base, actor) as researcher:
            grace.listen()
            mary.answers_lost = 1
            mary.listen()
            for _ in range(9):  # one site, in more trainings than there were threads once
                train(researcher, [abyss.site])
            grace.meanwhile = lambda: abyss.given_up
            began = time.monotonic()

            # Asks all three; the first two updates close a round.
            training = train(
                researcher,
                [ada.id, grace.id, mary.id],
                sampling="fixed",
                clients_per_round=2,
                over_selection=1.5,
            )
            for round in (0, 1):  # ada is down: nobody waits for her
                assert grace.answer(round).status_code == 201
                assert mary.answer(round).status_code == 201
            assert grace.answer(2).status_code == 201
            tried = "select receiver_id, max(attempt) from fl_server_core_notification group by 1"
            until(
                lambda: dict(embedded.rows(tried))[UUID(ada.id).hex] >= 2,
                "another attempt at ada's endpoint",
            )
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            ada.listen()
            assert ada.answer(2).status_code == 201

            def state() -> str:
                return str(checked(researcher.get(training), 200)["state"])

            until(lambda: state() == "C", "the end of the training")
            for site in (ada, grace, mary):
                site.hear_out()
        abyss.close()
        assert "Traceback" not in server.log

    everything = ["TRAINING_START", *["UPDATE_ROUND_START"] * 3, "TRAINING_FINISHED"]
    assert ada.endpoint.types() == ["TRAINING_START", "UPDATE_ROUND_START", "TRAINING_FINISHED"]
    assert grace.endpoint.types() == everything
    assert mary.endpoint.types() == ["TRAINING_START", *everything]
    assert grace.rounds() == mary.rounds() == [0, 1, 2]
    assert set(abyss.types()) == {"TRAINING_START"}
    assert grace.saw[:2] == [0, 0]  # was told of round 0 while others waited for the abyss
    assert set(ada.known) == set(grace.known) == {202}
    assert mary.known == [202, 200, 202, 202, 202, 202]  # by its delivery id
    again = [message["delivery_id"] for message in mary.endpoint.messages()]
    assert again[0] == again[1]
    assert len(set(again[1:])) == len(everything)
