"""What happens to files that nobody should touch any more."""

import os
from pathlib import Path


def overwrite(path: Path) -> None:
    """One bit of the last number, in place, and the times as they were: what a program can set."""
    stat = path.stat()
    with path.open("r+b") as file:
        data = bytearray(file.read())
        data[-1] ^= 1
        file.seek(0)
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def overwrite_and_link(path: Path) -> None:
    """The same, and one more name, which alone would be no change."""
    overwrite(path)
    path.with_name("link").hardlink_to(path)


def replace_by_rename(path: Path) -> None:
    """Another file under its name, of the same size and with the same times."""
    stat, other = path.stat(), path.with_name("other")
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def a_moment_later(path: Path) -> None:
    """Wait until a change has another time than the file has: the system's clock for files has ticks."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return probe.unlink()
