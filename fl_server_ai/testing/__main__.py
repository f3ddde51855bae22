"""`python -m fl_server_ai.testing module:Class [options as JSON]`: a table of the checks; 1 if one fails."""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.testing import CHECKS, Broken, conformance


def main() -> int:
    """Run every check on one strategy."""
    parser = argparse.ArgumentParser(prog="python -m fl_server_ai.testing", description=__doc__)
    parser.add_argument("strategy", help="module:Class, or the name of a registered one")
    parser.add_argument("options", nargs="?", default="{}", help='such as {"trim": 0.1}')
    given = parser.parse_args()
    options = json.loads(given.options)
    module, _, name = given.strategy.rpartition(":")
    sys.path.insert(0, "")
    try:
        kind = getattr(importlib.import_module(module), name) if module else STRATEGIES[name]
    except ModuleNotFoundError as error:
        parser.error(
            f"{error}; looked in {Path.cwd()} and where packages are installed. Run this from the folder of the file"
        )
    except (AttributeError, KeyError):
        parser.error(f"there is no strategy {given.strategy}")
    failed = 0
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                conformance(kind, check, Path(folder), options)
                said = "ok"
            except Broken as error:
                said = f"BROKEN  {error}"
                failed += 1
        sys.stdout.write(f"{check:<16}{said}\n")
    if not kind.paper:
        sys.stdout.write("note: no `paper`; the list of strategies will not say where it is from\n")
    sys.stdout.write(f"{name}: {len(CHECKS) - failed} of {len(CHECKS)} promises kept\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
