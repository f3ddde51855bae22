"""What processes cost over time: memory, threads, CPU seconds, database connections. Used by `waiting.py`."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import psycopg2

EVERY = 1.0  # seconds
CONNECTIONS = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


def pss(pid: int) -> int:
    """Bytes of a process, shared pages by halves, thirds and so on."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class Sample:
    """One look at everything. Memory in bytes."""

    at: float
    round: int
    connections: int | None
    web_rss: int
    web_pss: int
    web_threads: list[int]
    rss: dict[str, int] = field(default_factory=dict)  # one entry a process, "web 4711"


class Watch(threading.Thread):
    """Looks once a second, at the families of some processes, until told to stop."""

    def __init__(self, roles: Mapping[str, int], database_url: str | None) -> None:
        super().__init__(daemon=True)
        self.roots = {name: psutil.Process(pid) for name, pid in roles.items()}
        self.database_url = database_url
        self.samples: list[Sample] = []
        self.round = -1
        self.done = threading.Event()

    def family(self, role: str) -> list[psutil.Process]:
        """The process of a role and those below it, up to the next role."""
        others = {root.pid for name, root in self.roots.items() if name != role}
        with contextlib.suppress(psutil.Error):
            found = [self.roots[role], *self.roots[role].children(recursive=True)]
            return [process for process in found if process.pid not in others]
        return []

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each role up to now."""
        spent: dict[str, float] = defaultdict(float)
        for role in self.roots:
            for process in self.family(role):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    spent[role] += times.user + times.system
        return dict(spent)

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            cursor = None
            if self.database_url is not None:
                connection = psycopg2.connect(self.database_url)
                stack.callback(connection.close)
                connection.autocommit = True
                cursor = connection.cursor()
            while not self.done.wait(EVERY):
                count = None
                if cursor is not None:
                    cursor.execute(CONNECTIONS)
                    (count,) = cursor.fetchone() or (0,)
                self.samples.append(self._look(count))

    def _look(self, connections: int | None) -> Sample:
        web = self.family("web")
        sample = Sample(
            time.monotonic(), self.round, connections, 0, sum(pss(p.pid) for p in web), []
        )
        for role in self.roots:
            for process in web if role == "web" else self.family(role):
                with contextlib.suppress(psutil.Error):
                    size = process.memory_info().rss
                    if role == "web":
                        sample.web_rss += size
                        sample.web_threads.append(process.num_threads())
                    if role not in {"postgres", "redis"}:  # caches: they fill, by design
                        sample.rss[f"{role} {process.pid}"] = size
        return sample

    def series(self) -> dict[str, dict[int, int]]:
        """By process: its memory in each round, at the last look in it."""
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for sample in self.samples:
            for name, size in sample.rss.items():
                found[name][sample.round] = size
        return dict(found)

    def turnover(self) -> dict[str, dict[str, int]]:
        """By role: how many processes ended while it was looked, and how many joined after the first look."""
        looks = [set(sample.rss) for sample in self.samples]
        names = set().union(*looks)
        found = {name.split()[0]: {"ended": 0, "joined": 0} for name in sorted(names)}
        for name in names:
            found[name.split()[0]]["ended"] += name not in looks[-1]
            found[name.split()[0]]["joined"] += name not in looks[0]
        return found

    def drift(self, since: int) -> dict[str, float]:
        """By process: percent that its memory grew from round `since` to the last, by a fitted line.

        Those who were there in round `since`; `turnover` counts who went or came.
        """
        after = [sample for sample in self.samples if sample.round >= since]
        found = {}
        for name in after[0].rss if after else {}:
            at = np.array([sample.round for sample in after if name in sample.rss], float)
            size = np.array([sample.rss[name] for sample in after if name in sample.rss], float)
            if len(at) > 2 and np.ptp(at) > 0:
                slope, start = np.polyfit(at - at.min(), size, 1)
                found[name] = float(100 * slope * np.ptp(at) / start)
        return found
