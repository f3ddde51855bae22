"""Fuzz the containers, guided by coverage: python -m tests.fuzz.containers -max_total_time=600

Arguments are libFuzzer's. A crash, a hang of ten seconds or 2 GB of memory ends it with the input in a
file `crash-…`, `timeout-…` or `oom-…`; give that file as the only argument to see it again.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fl_server_ai.containers"]):
    from fl_server_ai.containers.container import CONTAINERS
    from tests.fuzz.target import check

    list(CONTAINERS)  # found by name at first use: now, so that they are instrumented too

from tests.fuzz.seeds import seeds

OPTIONS = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1"]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fl-corpus-") as folder:
        for index, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{index}").write_bytes(seed)
        replay = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        atheris.Setup([*sys.argv, *OPTIONS, *([] if replay else [folder])], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
