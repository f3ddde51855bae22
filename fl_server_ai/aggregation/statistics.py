"""Which tensors are statistics of the data and no weights: running means and variances, by their names.

torch's BatchNorm and InstanceNorm call them `running_mean` and `running_var`, Keras' layers `moving_mean` and
`moving_variance`. No gradient moves them. A variance that somebody extrapolates may come out below 0, and the model then
answers NaN, though every stored number is finite.
"""

import re

_NAMES = re.compile(r"(?:^|[./])(?:running_(?:mean|var)|moving_(?:mean|variance))$")


def is_statistic(name: str) -> bool:
    """Whether a tensor of this name is one."""
    return _NAMES.search(name) is not None
