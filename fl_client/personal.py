"""Tensors that stay with the site, where a training is about some of them only: FedBN, FedPer, LoRA."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any


def together(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is trained together: included by any glob of the task's, and excluded by none."""
    include, exclude = config.get("include") or [], config.get("exclude") or []
    if include and not any(fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in exclude)


def keep_mine(
    weights: Mapping[str, Any], mine: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The weights of the round, but one's own where a tensor is not trained together and `mine` has it.

    Call it first in `fit` and `evaluate`, with what the last `fit` ended with. Li et al. 2021, arXiv:2102.07623.
    """
    return {
        name: value if together(name, config) or name not in mine else mine[name]
        for name, value in weights.items()
    }
