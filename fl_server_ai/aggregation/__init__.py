"""How updates become the next model: small strategies above, one fast engine below.

Start reading here. No strategy sees a whole model or knows about files, threads or devices.

- `strategies/`   one file a strategy; add yours there, with `@STRATEGIES.register("Name")`
- `strategy.py`   the one interface they share, and the weights most of them use
- `options.py`    options in: a frozen dataclass, checked, with its JSON schema
- `engine.py`     `aggregate`: files in, one file out; chooses among the parts below
- `step.py`       the pass that writes the result, block by block
- `fold.py`       weighted mean of float blocks, in float64
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
- `device.py`     CPU or GPU, and how many threads

Only `engine` and what it imports know torch; this module, `strategies/` and the small modules those use do not:
the web process imports them. Strategies calculate with the methods of the tensors they are given.
"""

from typing import Any

from fl_server_ai.aggregation.strategy import (
    Refused,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)
from fl_server_core.registry import Registry

STRATEGIES: Registry[Strategy[Any]] = Registry("fl_server_ai.aggregation.strategies")


__all__ = ["STRATEGIES", "Refused", "Strategy", "UpdateMeta", "sample_weights", "weighting_field"]
