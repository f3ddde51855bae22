"""The conformance kit: what every aggregation strategy promises, checked on yours.

With pytest, one test for each promise:

    import pytest
    from fl_server_ai.testing import CHECKS, conformance
    from middle_half import MiddleHalf

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check, tmp_path):
        conformance(MiddleHalf, check, tmp_path)

Or as a table: `python -m fl_server_ai.testing middle_half:MiddleHalf`. Neither needs a database or settings.

- `rounds.py`   rounds through files and the engine, as a worker runs them
- `checks.py`   the checks that run rounds, by name
- `partial.py`  the check of updates that leave something out, for rules that permit it
- `alone.py`    the checks of the class alone: how it is described, its options, its hooks
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fl_server_ai.aggregation import Strategy
from fl_server_ai.testing import alone, checks, partial
from fl_server_ai.testing.rounds import Broken, Rounds, furnished

CHECKS: dict[str, Callable[[Rounds], None]] = {
    **alone.CHECKS,
    **checks.CHECKS,
    **partial.CHECKS,
}


def conformance(
    kind: type[Strategy[Any]], check: str, folder: Path, options: dict[str, Any] | None = None
) -> None:
    """Run one of `CHECKS` on a strategy with these options; `folder` is empty and may be filled.

    `Broken`, an `AssertionError`, says which promise is broken, and how.
    """
    CHECKS[check](Rounds(kind, folder, options or {}))


__all__ = ["CHECKS", "Broken", "Rounds", "conformance", "furnished"]
