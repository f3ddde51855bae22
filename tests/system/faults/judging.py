"""A lane whose updates are looked at: most are quarantined and released, one in each round is refused and replaced."""

import contextlib
import threading
from typing import Any

from tests.system.faults.clients import Patient, Site, _good
from tests.system.faults.lanes import Row, _same
from tests.system.faults.steering import Steering, enormous
from tests.system.sites import Arrays

BOUND = 3.0  # site 0 stays below it in round 0, and nobody else


class WildSite(Site):
    """Sends something enormous first, and in each round the right thing once that is refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wild: set[int] = set()

    def work(self, task: dict[str, Any], weights: Arrays) -> Arrays:
        if task["round"] in self._wild:
            return super().work(task, weights)
        self._wild.add(task["round"])
        return enormous(weights, self._number, task["round"])


class Judged(Steering):
    """Ends as if nobody had ever looked: what is released counts, what is refused was sent again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options |= {"max_update_norm": BOUND, "refused_retries": 1, "skip_model_tests": True}

    def cast(self) -> list[Any]:
        base, token = self.stack.base, [site.token for site in self.sites]
        return [
            *(Site(base, token[n], n, self.stop) for n in (0, 1)),
            WildSite(base, token[2], 2, self.stop),
        ]

    def _work(self, training: str) -> list[Any]:
        over, errors = threading.Event(), list[BaseException]()

        def decide() -> None:
            try:
                with contextlib.closing(
                    Patient(self.stack.base, self.actor.token, self.stop)
                ) as server:
                    while not over.wait(0.3):
                        self._decide(server, training)
            except BaseException as error:  # noqa: BLE001 - told below
                errors.append(error)

        thread = threading.Thread(target=decide, daemon=True)
        thread.start()
        try:
            return super()._work(training)
        finally:
            over.set()
            thread.join()
            assert not errors, f"{self.name}: {errors[0]!r}"

    def _decide(self, server: Patient, training: str) -> None:
        for update in _good(server.ask("GET", f"/api/trainings/{training}/models/")).json():
            if update.get("state") == "quarantined":
                act = "refuse" if "e+" in update["reason"] else "release"
                _good(server.ask("POST", f"/api/updates/{update['id']}/{act}/"))

    def _check_counts(self, training: str, sites: list[Any]) -> None:
        """As everywhere, after the refused ones have been looked for: one in each round."""
        refused = [row for row in super()._updates(self._key(training)) if row.state == "refused"]
        assert sorted(row.counted for row in refused) == list(range(self.rounds)), refused
        gone = {row.id for row in refused}
        for site in sites:
            site.acknowledged = [one for one in site.acknowledged if _same(one[1]) not in gone]
        super()._check_counts(training, sites)

    def _updates(self, key: str) -> list[Row]:
        return [row for row in super()._updates(key) if row.state != "refused"]
