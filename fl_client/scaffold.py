"""SCAFFOLD for training loops that handle arrays: Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_client.arrays import array_of, floats_of
from fl_client.client import Context
from fl_client.memory import Memory
from fl_client.statistics import is_statistic

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, Any]
    Own = dict[str, np.ndarray[Any, Any]]

CHANGE = "dc."


class Scaffold:
    """One round's control variates, for plain SGD with any learning rates; c_k is kept by the `context`.

    In `Client.fit`: add `correction` (c - c_k, by tensor name) to each gradient before the step; after the
    last one `dc = scaffold.finish(start, end, lr_sum)`, and return `FitResult(..., extras={"scaffold.dc": dc})`.
    Weights may be torch tensors; of dtypes that NumPy lacks (bfloat16) the correction is float32.
    Where a round is worked on again, or the server did not take it, c_k is as it was before. Where it did and then
    did not use it, the server's c lacks that change: it is taken back here too, as soon as a task says so.
    Running means and variances have none: their correction is zero.
    """

    def __init__(self, context: Context, start: "Arrays") -> None:
        import numpy as np

        self._memory, self._round = Memory(context, "scaffold"), int(context.task["round"])
        mine, self._pending = _remembered(self._memory)
        servers = context.extras.get("scaffold.c", {})
        floats = {
            name: numbers
            for name, value in start.items()
            if (numbers := floats_of(value)) is not None
        }
        self._mine = {
            name: mine.get(name, np.zeros(numbers.shape, numbers.dtype))
            for name, numbers in floats.items()
            if not is_statistic(name)
        }
        self._servers = {name: servers.get(name, mine * 0) for name, mine in self._mine.items()}
        self.correction: dict[str, np.ndarray[Any, Any]] = {
            name: (self._servers[name] - self._mine[name]).astype(array_of(start[name]).dtype)
            if name in self._mine
            else np.zeros_like(array_of(start[name]))
            for name in floats
        }

    def finish(
        self, start: "Arrays", end: "Arrays", lr_sum: float
    ) -> "dict[str, np.ndarray[Any, Any]]":
        """The change of c_k, to be sent: c_k' = c_k - c + (start - end) / lr_sum (option II of the paper).

        `lr_sum` is the learning rates of all steps added up: steps times rate, if that is constant. Give
        only trainable tensors in `end`, or all: what is not in it keeps its variate.
        """
        import numpy as np

        changes = {}
        kept = dict(self._mine)
        for name, servers in self._servers.items():
            if name not in end:
                continue
            way = array_of(start[name]).astype(np.float64) - array_of(end[name])
            change = (way / lr_sum - servers).astype(self._mine[name].dtype)
            changes[name] = change
            kept[name] = self._mine[name] + change
        pending = {**self._pending, self._round: changes}
        self._memory.save(
            {f"c.{name}": value for name, value in kept.items()}
            | {
                f"{CHANGE}{number}.{name}": value
                for number, change in pending.items()
                for name, value in change.items()
            }
        )
        return changes


def _remembered(memory: Memory) -> "tuple[Own, dict[int, Own]]":
    """c_k without the changes that were not used; and those in it of which that is not known yet, by round."""
    mine: Own = {}
    pending: dict[int, Own] = {}
    for name, value in memory.load().items():
        if name.startswith("c."):
            mine[name.removeprefix("c.")] = value
            continue
        round, _, tensor = name.removeprefix(CHANGE).partition(".")
        pending.setdefault(int(round), {})[tensor] = value
    for number in memory.unused & pending.keys():
        for tensor, change in pending[number].items():
            mine[tensor] = mine[tensor] - change
    return mine, {number: pending[number] for number in memory.undecided & pending.keys()}
