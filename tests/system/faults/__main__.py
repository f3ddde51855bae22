"""`python -m tests.system.faults production --seed 1 --faults 200`: kills, and the table of where."""

import argparse
import tempfile
from pathlib import Path

from tests.system.faults.losses import SHARED_BYTES
from tests.system.faults.schedule import STACKS, Run
from tests.system.servers import reap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=STACKS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=200)
    given = parser.parse_args()
    reap()
    with tempfile.TemporaryDirectory(prefix="fl-faults-") as folder:
        stack = STACKS[given.kind](Path(folder), FL_SHARED_ROUND_BYTES=str(SHARED_BYTES))
        with stack.up():
            print(Run(given.kind, given.seed, given.faults, stack).run())  # noqa: T201


if __name__ == "__main__":
    main()
