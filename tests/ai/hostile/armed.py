"""Unpickles programs as Python's own pickle does, to prove that they would do what they are here for."""

import io
import json
import pickle
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

PATIENCE = 5.0  # seconds; only what fails to fire takes that long


class Stand:
    """For classes of torch's and of clients', which are not needed to run what is armed."""

    def __init__(self, *_: object) -> None:
        pass

    def __new__(cls, *_: object) -> "Stand":
        return object.__new__(cls)


class Loader(pickle.Unpickler):
    """Python's, with these stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in {"torch", "hospital"}:
            return Stand
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def fires(archive: Path, marker: Path) -> bool:
    """Whether loading the program in the archive creates the marker."""
    marker.unlink(missing_ok=True)
    with zipfile.ZipFile(archive) as opened:
        program = opened.read("archive/data.pkl")
    try:
        Loader(io.BytesIO(program)).load()
    except Exception as error:  # noqa: BLE001  what it leaves is of no use; what it did counts
        sys.stderr.write(f"{type(error)} {str(error)[:100]}\n")
    left = PATIENCE
    while not marker.exists() and left > 0:  # some commands run beside
        left -= 0.01
        time.sleep(0.01)
    fired = marker.exists()
    marker.unlink(missing_ok=True)
    return fired


def main() -> None:
    job = json.loads(sys.stdin.readline())
    marker = Path(job["marker"])
    found = {path: fires(Path(path), marker) for path in job["files"]}
    Path(job["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
