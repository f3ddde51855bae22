"""What a model does not know: how to draw, how to add up the draws, how to judge the result.

Start reading here. Nothing in this package runs a model; a sandbox does, following a method's `plan`.

- `methods/`         one file a method; add yours there, with `@UNCERTAINTY.register("NAME")`
- `method.py`        the interface they share: options in, a plan of draws out
- `options.py`       options that every method takes, and how they are checked
- `seeds.py`         one random stream for each (seed, draw, name)

The modules above do not know torch, because the web process imports them. Those below do:

- `dropout.py`       switches dropout on in a model that is otherwise in evaluation
- `moments.py`       checks and combines the clients' first and second moments
- `swag.py`          weights drawn from such moments, tensor by tensor
- `summary.py`       outputs of the draws in, an `Answer` out, without keeping the draws
- `answer.py`        what the caller gets: JSON or tensors, never a NaN
- `distributions.py` outputs read as probabilities, with stable logarithms
- `spread.py`        running mean, variance and entropies
- `quantiles.py`     quantiles of weighted draws
- `calibration.py`   ECE, NLL, Brier score and reliability of labelled probabilities
- `ranking.py`       does uncertainty find the errors? accuracy against coverage, AUROC

`pictures.py` draws the last two as SVG, from plain numbers and without torch.
"""

from typing import Any

from fl_server_ai.uncertainty.method import DrawPlan, Kind, Method
from fl_server_core.registry import Registry

UNCERTAINTY: Registry[Method[Any]] = Registry("fl_server_ai.uncertainty.methods")

__all__ = ["UNCERTAINTY", "DrawPlan", "Kind", "Method"]
