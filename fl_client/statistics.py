"""Running means and variances among the weights: no gradient moves them, and what is past a mean may be no variance."""

import re

_NAMES = re.compile(r"(?:^|[./])(?:running_(?:mean|var)|moving_(?:mean|variance))$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is one by its name, as torch's and Keras' normalising layers call them; the server's rule."""
    return _NAMES.search(name) is not None
