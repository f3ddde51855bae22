"""Lanes of rounds that workers share, and of updates whose files are lost."""

from typing import Any

from tests.system.faults.clients import Site
from tests.system.faults.lanes import Trainings
from tests.system.faults.stacks import Stack
from tests.system.sites import model

SHARED_BYTES = 100_000  # of updates: more than all other lanes' rounds have
LAG = 1.5  # seconds that the others take longer than who loses


class Shared(Trainings):
    """Rounds that are large enough for all aggregation workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = model(SHARED_BYTES // 8, seed=3)


class LosingSite(Site):
    """Its first update of a training is lost on the server's disk, once it was acknowledged."""

    def __init__(self, *args: Any, stack: Stack, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stack, self._lost = stack, False

    def _work(self, task: dict[str, Any]) -> None:
        super()._work(task)
        if self._lost or not self.acknowledged:
            return
        self._lost = True
        _, update = self.acknowledged[-1]
        key = update if "postgres" in self._stack.targets else update.replace("-", "")
        found = self._stack.rows(
            "SELECT b.name FROM fl_server_core_blob b JOIN fl_server_core_localmodel u ON "
            "u.blob_id = b.id WHERE u.id = %s AND u.state = 'accepted'",
            key,
        )
        for (name,) in found:
            (self._stack.folder / "data" / "weights" / str(name)).unlink(missing_ok=True)
            self.acknowledged.pop()  # it is asked for again, and gets another id


class Losing(Trainings):
    """An update is lost in each training, which ends as if it had not been."""

    def cast(self) -> list[Any]:
        base, token = self.stack.base, [site.token for site in self.sites]
        return [
            LosingSite(base, token[0], 0, self.stop, stack=self.stack),
            *(Site(base, token[n], n, self.stop, lag=LAG) for n in (1, 2)),
        ]
