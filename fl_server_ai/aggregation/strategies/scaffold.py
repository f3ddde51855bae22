"""Control variates against client drift: Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fl_server_ai.aggregation import STRATEGIES, Extra, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import stride

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class ScaffoldOptions:
    """The server's step."""

    server_lr: float = field(
        default=1.0, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )


@STRATEGIES.register("SCAFFOLD")
class Scaffold(Strategy[ScaffoldOptions]):
    """x' = x + server_lr mean(y_k - x); c' = c + |S|/N mean(dc_k), both means unweighted.

    S are the round's updates, N all participants of the training when it asked. As they join and leave, N c stays the
    sum of all c_k. Who joins has 0; who leaves stays in the sum as a client that is never sampled again, so that the
    gradients of the others and its last one sum to 0 in the end: only a new training is rid of that. A client steps by -lr (g - c_k + c), then sets c_k' = c_k - c + (x - y_k) / (sum of its learning rates) and sends
    dc_k = c_k' - c_k as `extra.scaffold.dc.<tensor>`; it gets c as `extra.scaffold.c.<tensor>` with its task and
    keeps c_k. Plain SGD only, with any schedule. `fl_client.scaffold` does the client's part.
    """

    Options = ScaffoldOptions
    paper = "1910.06378"
    state_blocks = ("c",)
    population_means = ("c",)
    clients_keep = "their own control variates, whose mean the server's is"
    only_fresh = "c is the mean of what its sites keep, and late changes count less"
    shared: "ClassVar[Mapping[str, str]]" = {"scaffold.c": "c"}
    share = 1.0

    def extras(self) -> tuple[Extra, ...]:
        said = "the change of the client's control variate; in the SDK fl_client.Scaffold makes it"
        return (Extra("scaffold.dc", said, per_tensor=True),)

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.share = len(metas) / self.population(len(metas))
        return [1] * len(metas)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        state["c"] = state["c"] + state["scaffold.dc"] * self.share
        return stride(x, y, self.options.server_lr)
