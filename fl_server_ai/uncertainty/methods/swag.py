"""Weights drawn from a Gaussian around their mean: Maddox et al. 2019, https://arxiv.org/abs/1902.02476."""

from dataclasses import dataclass, field

from fl_server_ai.uncertainty import UNCERTAINTY, Kind, Method
from fl_server_ai.uncertainty.options import CommonOptions


@dataclass(frozen=True)
class SWAGOptions(CommonOptions):
    """How far the weights move, and whose disagreement moves them."""

    scale: float = field(
        default=1.0,
        metadata={
            "ge": 0.0,
            "le": 1e6,
            "doc": "Factor on the covariance; the paper tries 0.5 and 1.",
        },
    )
    eps: float = field(
        default=1e-12, metadata={"ge": 0.0, "le": 1.0, "doc": "The least variance of a weight."}
    )
    variance: str = field(
        default="total",
        metadata={
            "choices": ("total", "within", "between"),
            "doc": "Spread of the weights in the clients' training, between the clients, or both; "
            "takes effect when moments are aggregated, not when a model is asked.",
        },
    )


@UNCERTAINTY.register("SWAG")
class SWAG(Method[SWAGOptions]):
    """N models from N(mean, scale * diag(max(second - mean^2, eps))): `swag.draw_weights`."""

    Options = SWAGOptions
    paper = "1902.02476"
    kind = Kind.WEIGHTS
