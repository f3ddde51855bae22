"""Whether the files that are combined are those that were accepted: size and times each time, digests on suspicion.

A file that was accepted is never written again, so the system's change time (ctime, which no program can set) lies before
that of its row. Where it does not, somebody touched the file, restored it, or this is a copy from another machine: then its
SHA-256 decides. docs/explanation/crash-safety.md says why not always.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fl_server_ai.aggregation.device import thread_count
from fl_server_ai.aggregation.engine import UpdateChanged
from fl_server_core.exceptions import AggregationException
from fl_server_core.models import Blob, LocalModel
from fl_server_core.storage import has_paths, local_path

Stamp = tuple[int, int, int] | None


class UpdatesLost(Exception):
    """Files of these updates are gone or not what was accepted; each with what is wrong."""

    def __init__(self, lost: Sequence[tuple[LocalModel, str]]) -> None:
        super().__init__(f"{len(lost)} updates were lost: {lost[0][1]}")
        self.lost = list(lost)


class Disturbed(Exception):
    """A file was touched while it was read, and is as it was: the same again may go well."""


def fault_of(blob: Blob, path: Path, *, since: datetime | None = None, always: bool = False) -> str:
    """What is wrong with the file of a blob; empty if nothing is.

    Its digest is compared if it was touched after it was stored (after `since`, where that is later: it was
    looked at then), if it is a copy, or `always`.
    """
    try:
        stat = path.stat()
        if stat.st_size != blob.size:
            return f"its file has {stat.st_size} bytes, not {blob.size}"
        known = max(blob.created_at, since or blob.created_at)
        touched = datetime.fromtimestamp(stat.st_ctime, UTC) > known
        if (touched or always or not has_paths()) and _digest(path) != blob.digest:
            return "its file is not the one that was accepted (SHA-256)"
    except FileNotFoundError:
        return "its file has disappeared"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def faults_of(
    pairs: Sequence[tuple[Blob, Path]], *, since: datetime | None = None, always: bool = False
) -> list[str]:
    """The same of many files, side by side."""
    with ThreadPoolExecutor(thread_count(None)) as crew:
        return list(crew.map(lambda pair: fault_of(*pair, since=since, always=always), pairs))


def stamp_of(path: Path) -> Stamp:
    """Another one as soon as the file is written to, replaced or removed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def files_of(update: LocalModel) -> list[Blob]:
    """What an update is made of."""
    return [blob for blob in (update.blob, update.extras, update.mask) if blob is not None]


@contextmanager
def watched(
    updates: Sequence[LocalModel],
    participant_of: Callable[[LocalModel], str],
    models: Sequence[Blob],
) -> Iterator[None]:
    """Let digests decide on a file that has changed while the block read it.

    `UpdatesLost` for an update, `AggregationException` for one of `models`, which are the training's own;
    `Disturbed` where all is as it was.
    """
    try:
        yield
    except UpdateChanged as error:
        owner = next((u for u in updates if participant_of(u) == error.participant), None)
        said = _fault_now(models if owner is None else files_of(owner))
        if said and owner is None:
            raise model_damaged(said) from error
        if said and owner is not None:
            raise UpdatesLost([(owner, said)]) from error
        raise Disturbed(str(error)) from error


def model_damaged(fault: str) -> AggregationException:
    """Ends the training, and tells its actor what to do."""
    return AggregationException(
        f"a file of the model itself or its state is damaged: {fault}; restore the weights from a "
        "backup and retry the training"
    )


def _fault_now(blobs: Sequence[Blob]) -> str:
    for blob in blobs:
        try:
            with local_path(blob) as path:
                said = fault_of(blob, path, always=True)
        except FileNotFoundError:
            said = "its file has disappeared"
        if said:
            return said
    return ""
