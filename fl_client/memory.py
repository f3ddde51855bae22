"""What a site keeps from round to round of one training, on its own disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_client.client import Context
from fl_client.safetensors_io import load, save


class Memory:
    """Named arrays under one key. What is saved in a round is read from the next one on.

    So a round that is worked on twice begins both times with the same. What was saved in a round that the server did
    not take is dropped (by the agent), and what was saved in one whose update was taken and then not used (refused,
    lost, or its round skipped), or never came, is passed over: the task says which (`own_updates`).
    """

    def __init__(self, context: Context, key: str) -> None:
        self._folder = context.folder
        self._key = key
        self._round = int(context.task["round"])
        told = context.task.get("own_updates") or {}
        self.unused = frozenset(int(number) for number in told.get("unused") or ())
        self.undecided = frozenset(int(number) for number in told.get("undecided") or ())

    def load(self) -> dict[str, Any]:
        """What the newest earlier round saved whose update may count; nothing at first."""
        earlier = [number for number in self._earlier() if number not in self.unused]
        return load(self._path(max(earlier))) if earlier else {}

    def save(self, arrays: Mapping[str, Any]) -> None:
        """Keep these for later rounds; durable when this returns. Again: the last ones count."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        earlier = sorted(self._earlier())
        counting = [number for number in earlier if number not in self.unused]
        save(self._path(self._round), arrays)
        for number in earlier:
            if number not in counting[-1:]:
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._key}-{number}.safetensors"

    def _earlier(self) -> list[int]:
        return [number for number in self._rounds() if number < self._round]

    def _rounds(self) -> list[int]:
        found = []
        for path in self._folder.glob(f"{self._key}-*.safetensors"):
            number = path.stem.removeprefix(f"{self._key}-")
            if number.isdecimal():
                found.append(int(number))
        return found


def forget_round(folder: Path, number: int) -> None:
    """Drop what was saved in a round that did not count."""
    for path in folder.glob(f"*-{number}.safetensors"):
        path.unlink(missing_ok=True)
