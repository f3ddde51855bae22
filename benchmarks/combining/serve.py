"""A process that answers requests one JSON line at a time, so that two sides can take turns."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Answer = dict[str, Any]


def serve(handlers: dict[str, Callable[..., Answer]]) -> None:
    """Answer every request on standard input: `{"do": name, ...}` calls that handler with the rest."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), file=answers, flush=True)


def timed(work: Callable[[], Any]) -> tuple[Any, Answer]:
    """The result, and the wall and CPU seconds of all threads of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
    }


class Side:
    """One such process, asked from here."""

    def __init__(self, python: str | Path, script: str, *args: str) -> None:
        self._process = subprocess.Popen(
            [python, ROOT / script, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> Answer:
        """Raises RuntimeError if the process is gone."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def median(answers: Sequence[Answer], key: str) -> float:
    values = sorted(answer[key] for answer in answers)
    return float(values[len(values) // 2] + values[(len(values) - 1) // 2]) / 2
