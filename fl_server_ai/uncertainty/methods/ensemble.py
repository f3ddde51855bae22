"""Several models asked alike: Lakshminarayanan et al. 2016, https://arxiv.org/abs/1612.01474."""

from dataclasses import dataclass, field

from fl_server_ai.uncertainty import UNCERTAINTY, DrawPlan, Kind, Method
from fl_server_ai.uncertainty.options import CommonOptions


@dataclass(frozen=True)
class EnsembleOptions(CommonOptions):
    """Who counts how much."""

    weighting: str = field(
        default="given",
        metadata={
            "choices": ("given", "equal"),
            "doc": "Members count by the weights given with the model, or all alike.",
        },
    )


@UNCERTAINTY.register("ENSEMBLE")
class Ensemble(Method[EnsembleOptions]):
    """The members' outputs as a weighted mixture; the members are those of a MEAN model."""

    Options = EnsembleOptions
    paper = "1612.01474"
    kind = Kind.MEMBERS

    def plan(self) -> DrawPlan:
        return DrawPlan(self.kind, None, self.options.seed)
