"""How updates become the next model: small strategies above, one fast engine below.

Start reading here. No strategy sees a whole model or knows about files, threads or devices.

- `strategies/`   one file a strategy; add yours there, with `@STRATEGIES.register("Name")`
- `strategy.py`   the one interface they share, and the weights most of them use
- `options.py`    options in: a frozen dataclass, checked, with its JSON schema
- `fitness.py`    whether a plug-in's class can be a strategy at all
- `engine.py`     `aggregate`: files in, one file out
- `combination.py` the passes over one round's files: comparing, weighing, combining
- `slices.py`     the same by several workers, a slice of the columns each, and joining them
- `step.py`       the pass that writes the result, block by block
- `fold.py`       weighted mean of float blocks, in float64
- `rounding.py`  float64 to narrower dtypes in one rounding
- `dtypes.py`     which dtypes can be combined
- `integers.py`   what happens to integer and bool buffers
- `gram.py`       inner products of all updates, for rules that compare them
- `geometry.py` distances between updates, from those products
- `order.py`    order statistics of every coordinate, for medians and trimmed means
- `adaptive.py` what the adaptive server optimizers share
- `blocks.py`     layout, reading and writing of weight files
- `files.py`      the open files of one aggregation
- `rebasing.py`   updates that started from an older model
- `crew.py`       threads that share a list of jobs
- `state.py`      what a strategy remembers from round to round
- `flat.py`       vectors beside a model, in the one form that state and extras share; needs no torch
- `beside.py`     the extras of all updates, block by block
- `masks.py`      which single numbers updates left out
- `sparse.py`     means over updates that do
- `statistics.py` which tensors are running means and variances, which no rule extrapolates
- `shared.py`     what clients get of the strategy's state
- `largest.py`    how far each update goes at most, for rules that leave out broken ones
- `pages.py`     the largest buffers, from the system and back to it
- `transfer.py`   blocks on their way to a GPU
- `device.py`     CPU or GPU, and how many threads

Only `engine` and what it imports know torch; this module, `strategies/` and the small modules those use do not:
the web process imports them. Strategies calculate with the methods of the tensors they are given.
"""

from typing import Any

from fl_server_ai.aggregation.fitness import check_fit
from fl_server_ai.aggregation.strategy import (
    Extra,
    Refused,
    RoundFacts,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)
from fl_server_core.registry import Registry

STRATEGIES: Registry[Strategy[Any]] = Registry(
    "fl_server_ai.aggregation.strategies", verify=check_fit
)


__all__ = [
    "STRATEGIES",
    "Extra",
    "Refused",
    "RoundFacts",
    "Strategy",
    "UpdateMeta",
    "sample_weights",
    "weighting_field",
]
