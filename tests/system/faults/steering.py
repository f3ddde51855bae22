"""Lanes that steer: pause, resume, more time, other participants, cancel, delete, retry, and giving up."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.system.faults.clients import PATIENCE, Site, _good
from tests.system.faults.lanes import Trainings, account
from tests.system.sites import Arrays, model

HUGE = np.float32(1e37)


class Steering(Trainings):
    """What steering lanes share."""

    def steer(self, training: str, control: str, *, json: dict[str, Any] | None = None) -> str:
        url = f"/api/trainings/{training}/{control}/"
        told = _good(self.server.ask("POST", url, json=json)).json()
        return str(told.get("state", ""))

    def ended(self, training: str) -> dict[str, Any]:
        """The training, once it has failed."""
        end = time.monotonic() + PATIENCE
        while (found := self.said(training))["state"] != "E":
            assert time.monotonic() < end, f"{self._situation(training)} after {PATIENCE:.0f} s"
            time.sleep(0.2)
        return found

    def said(self, training: str) -> dict[str, Any]:
        return dict(_good(self.server.ask("GET", f"/api/trainings/{training}/")).json())

    def delete(self, training: str) -> None:
        gone = self.server.ask("DELETE", f"/api/trainings/{training}/")
        assert gone.status_code in (200, 404), gone.text  # 404: it was deleted, unheard


class Steered(Steering):
    """A site fails, which ends the training; after a retry it ends as if nothing had been."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, sites=2, failing=frozenset({1}), **kwargs)
        self.options |= {"failure_policy": "fail", "skip_model_tests": True}
        self.guest = account(self.stack.base, self.stop, f"{self.name}-guest", client=True)

    def _begin(self) -> tuple[str, str]:
        start, name = self.model(), f"{self.name}-{self.turns}"
        other, _ = self._create(start, f"{name}-cancelled")
        self._start(other)
        assert self.steer(other, "cancel") == "X"
        self.delete(other)

        training, model_id = self._create(start, name)
        self._start(training)
        self.steer(training, "extend", json={"seconds": 30 * 86_400})
        assert self.steer(training, "pause") == "P"
        url, body = f"/api/trainings/{training}/clients/", {"clients": [self.guest.id]}
        for method in ("PUT", "DELETE"):  # from the next round on; and so not at all
            _good(self.server.ask(method, url, json=body))
        assert self.steer(training, "resume") == "O"
        return training, model_id

    def cast(self) -> list[Any]:
        return [
            Site(self.stack.base, self.sites[0].token, 0, self.stop),
            Site(self.stack.base, self.sites[1].token, 1, self.stop, failing=self.failing),
        ]

    def _work(self, training: str) -> list[Any]:
        before = super()._work(training)
        self.failing = frozenset()
        assert {site.final["training_state"] for site in before} == {"E"}
        assert self.ended(training)["reason"].startswith("TOO_MANY_FAILURES")
        assert self.steer(training, "retry") == "O"
        after = super()._work(training)
        self.failing = frozenset({1})
        return before + after


def enormous(weights: Mapping[str, np.ndarray], site: int, round: int) -> Arrays:
    return {name: array + HUGE for name, array in weights.items()}


class Doomed(Steering):
    """Updates that no float32 can hold the step of: given up, the same again after a retry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, sites=1, **kwargs)
        self.options |= {"server_lr": 1000.0, "skip_model_tests": True}
        self.start = model(50)

    def turn(self) -> None:
        training, _ = self._begin()
        self._work(training)
        reason = self.ended(training)["reason"]
        assert reason.startswith("AGGREGATION_FAILED"), reason
        self.steer(training, "retry")
        assert self.ended(training)["reason"] == reason
        self.delete(training)
        self.turns += 1

    def cast(self) -> list[Any]:
        (site,) = self.sites
        return [Site(self.stack.base, site.token, 0, self.stop, train=enormous)]
