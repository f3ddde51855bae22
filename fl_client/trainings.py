"""Trainings as their owner sees them: create, start, wait, read the metrics."""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fl_client.errors import TrainingFailed
from fl_client.transport import Transport

log = logging.getLogger("fl.client")
Rows = list[dict[str, Any]]


class Training:
    """A handle on one training; every call asks the server anew."""

    def __init__(self, transport: Transport, training: str) -> None:
        self._transport = transport
        self.id = training

    def __repr__(self) -> str:
        return f"Training({self.id!r})"

    def get(self) -> dict[str, Any]:
        """`state` (I initial, O ongoing, S SWAG, P paused, C complete, X cancelled, E error), `round`, `reason` and more."""
        fields: dict[str, Any] = self._transport.json("GET", f"trainings/{self.id}/")
        return fields

    def start(self) -> None:
        """Conflict if it has been started before."""
        self._transport.json("POST", f"trainings/{self.id}/start/")

    def pause(self) -> None:
        """Sites are asked for nothing until `resume`; deadlines stand still. Paused already: fine."""
        self._steer("pause")

    def resume(self) -> None:
        """Go on where the pause began. Running already: fine."""
        self._steer("resume")

    def cancel(self) -> None:
        """End it for good; `wait` then raises TrainingFailed. Cancelled already: fine."""
        self._steer("cancel")

    def retry(self) -> None:
        """After an error: try the failed step again, with the updates that had been accepted.

        Conflict if it would fail again at once, for example because too few sites take part.
        """
        self._steer("retry")

    def extend(self, seconds: float) -> None:
        """Let the current round, or test, last for `seconds` from now; never less than it has."""
        self._steer("extend", {"seconds": seconds})

    def _steer(self, verb: str, body: dict[str, Any] | None = None) -> None:
        url = f"trainings/{self.id}/{verb}/"
        self._transport.json("POST", url, body=body, repeatable=True)

    def add_clients(self, clients: Sequence[str]) -> None:
        """Who takes part already stays."""
        self._transport.json("PUT", f"trainings/{self.id}/clients/", body=_ids(clients))

    def remove_clients(self, clients: Sequence[str]) -> None:
        self._transport.json(
            "DELETE", f"trainings/{self.id}/clients/", body=_ids(clients), repeatable=True
        )

    def wait(
        self,
        timeout: float | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Block until the training is complete and return it.

        `on_round` gets the training each time its round has advanced. `timeout` is in seconds,
        TimeoutError afterwards; TrainingFailed with the server's reason if it ends in error. A
        server that is away for a few minutes is waited for. A round that got fewer updates than it
        asked for is a warning of the logger "fl.client"; `gaps` of what is returned lists them.
        """
        warned: set[int] = set()
        give_up = None if timeout is None else time.monotonic() + timeout
        seen: int | None = None
        pause = 0.2
        while True:
            now = self._transport.patiently(self.get, attempts=10)
            for gap in now.get("gaps", ()):
                if gap["round"] not in warned:
                    warned.add(gap["round"])
                    log.warning("%s", gap["text"])
            if seen is not None and now["round"] != seen and on_round is not None:
                on_round(now)
            pause = 0.2 if now["round"] != seen else min(pause * 1.5, 3.0)
            seen = now["round"]
            if now["state"] == "C":
                ended: dict[str, Any] = now
                return ended
            if now["state"] in {"E", "X"}:
                raise TrainingFailed(0, "TRAINING_FAILED", str(now.get("reason") or "no reason"))
            if give_up is not None and time.monotonic() + pause > give_up:
                raise TimeoutError(f"training {self.id} is in round {seen} after {timeout} s")
            time.sleep(pause)

    def metrics(self) -> Rows:
        """Rows `key value_float step reporter identifier`; "aggregated" rows have no reporter."""
        rows: Rows = self._transport.json("GET", f"models/{self.model}/metrics/")
        return rows

    def rounds(self) -> Rows:
        """Each round with who was asked, who answered and when."""
        rows: Rows = self._transport.json("GET", f"trainings/{self.id}/rounds/")
        return rows

    @property
    def model(self) -> str:
        """The id of the model that is trained: a clone, if the given one was in use already."""
        return str(self.get()["model"])


class Trainings:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        *,
        model: str,
        rounds: int,
        clients: Sequence[str] = (),
        aggregation_method: str = "FedAvg",
        metric_names: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        uncertainty_method: str | None = None,
    ) -> Training:
        """A training that has not started. `clients` are user ids; more may be added later.

        `metric_names` are what `evaluate` reports every round; none means no evaluation.
        `options` are those of the aggregation method and the server refuses unknown ones. A round
        goes on with what has arrived when every site has answered or failed, or at its deadline: one
        update is enough unless `options["min_updates"]` says more.
        """
        body: dict[str, Any] = {
            "model_id": str(model),
            "target_num_updates": rounds,
            "metric_names": list(metric_names),
            "aggregation_method": aggregation_method,
            "options": dict(options or {}),
            **_ids(clients),
        }
        if uncertainty_method is not None:
            body["uncertainty_method"] = uncertainty_method
        answer = self._transport.json("POST", "trainings/", body=body, key=str(uuid.uuid4()))
        return Training(self._transport, str(answer["training_id"]))

    def get(self, training: str) -> Training:
        """A handle; whether the training exists shows with the first call on it."""
        return Training(self._transport, training)

    def list(self) -> Rows:
        rows: Rows = self._transport.json("GET", "trainings/")
        return rows

    def delete(self, training: str) -> None:
        self._transport.json("DELETE", f"trainings/{training}/")


def _ids(clients: Sequence[str]) -> dict[str, list[str]]:
    return {"clients": [str(client) for client in clients]}
