"""One server per data directory: a lock that the kernel drops when its holder dies, however."""

import fcntl
import os
from pathlib import Path


class DataDirBusy(Exception):
    """Another process serves this data directory."""


class DataDirLock:
    """Held until `release()` or the end of the process; the file stays."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "serve.lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise DataDirBusy(
                f"another server (process {holder}) is using {folder}; "
                "stop it first, or set FL_DATA_DIR to another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()
