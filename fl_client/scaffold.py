"""SCAFFOLD for training loops that handle arrays: Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_client.client import Context
from fl_client.memory import Memory

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]


class Scaffold:
    """One round's control variates, for plain SGD with any learning rates; c_k is kept by the `context`.

    In `Client.fit`: add `correction` (c - c_k, by tensor name) to each gradient before the step; after the
    last one `dc = scaffold.finish(start, end, lr_sum)`, and return `FitResult(..., extras={"scaffold.dc": dc})`.
    Where a round is worked on again, or the server did not take it, c_k is as it was before.
    """

    def __init__(self, context: Context, start: "Arrays") -> None:
        import numpy as np

        self._memory = Memory(context, "scaffold")
        mine, servers = self._memory.load(), context.extras.get("scaffold.c", {})
        floats = {name: value for name, value in start.items() if value.dtype.kind == "f"}
        self._mine = {
            name: mine.get(name, np.zeros(value.shape, "f8" if value.dtype == "f8" else "f4"))
            for name, value in floats.items()
        }
        self._servers = {name: servers.get(name, mine * 0) for name, mine in self._mine.items()}
        self.correction: dict[str, np.ndarray[Any, Any]] = {
            name: (self._servers[name] - self._mine[name]).astype(value.dtype)
            for name, value in floats.items()
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
            way = np.asarray(start[name], np.float64) - np.asarray(end[name], np.float64)
            change = (way / lr_sum - servers).astype(self._mine[name].dtype)
            changes[name] = change
            kept[name] = self._mine[name] + change
        self._memory.save(kept)
        return changes
