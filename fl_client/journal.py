"""Finished updates that the server has not confirmed yet, so that a restart sends, not retrains."""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fl_client.digest import sha256_of

log = logging.getLogger("fl.client")

_KEPT = 4  # a site may take part in several trainings at a time


@dataclass(frozen=True)
class Entry:
    """The digest of an update on disk, and the fields that go with it."""

    sha256: str
    form: list[tuple[str, str]]


class Journal:
    """`journal.json` in a folder of the agent's own; one agent per folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / "journal.json"

    def place(self, task: str) -> Path:
        """Where the update of a task is to be written."""
        return self.folder / f"update-{hashlib.sha256(task.encode()).hexdigest()[:16]}.safetensors"

    def put(self, task: str, sha256: str, form: list[tuple[str, str]]) -> Entry:
        """Note that the file at `place(task)` is complete; the oldest entries make room."""
        entry = Entry(sha256, form)
        rows = {other: e for other, e in self._read().items() if other != task}
        for other in list(rows)[: len(rows) - _KEPT + 1]:
            del rows[other]
            self._clear(other)
        self._write(rows | {task: entry})
        return entry

    def get(self, task: str) -> Entry | None:
        """The finished update of a task; None if there is none, or its bytes have changed."""
        entry = self._read().get(task)
        if entry is None:
            return None
        path = self.place(task)
        if not path.exists() or sha256_of(path) != entry.sha256:
            log.warning("the journalled update of task %s is damaged; training again", task)
            self.drop(task)
            return None
        return entry

    def drop(self, task: str) -> None:
        self._write({other: e for other, e in self._read().items() if other != task})
        self._clear(task)

    def _clear(self, task: str) -> None:
        path = self.place(task)
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".upload").unlink(missing_ok=True)  # how far its transfer was

    def _read(self) -> dict[str, Entry]:
        try:
            rows = json.loads(self._path.read_text())
            return {
                task: Entry(row["sha256"], [(k, v) for k, v in row["form"]])
                for task, row in rows.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is unreadable; starting a new one", self._path)
            return {}

    def _write(self, rows: dict[str, Entry]) -> None:
        partial = self._path.with_suffix(".tmp")
        with partial.open("w") as file:
            json.dump({task: asdict(entry) for task, entry in rows.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
