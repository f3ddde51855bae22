"""The folder of the kill points, from the side of the tests: arming them, and reading what happened."""

from collections import Counter
from pathlib import Path

from fl_server_core.killpoints import POINTS

# What a command line holds, in this order, and what its process is called.
PROCESSES = {
    "embedded.inference_child": "asker",
    "embedded.child": "child",
    "manage.py serve": "serve",
    "fl_server.front": "web",
    "multiprocessing.spawn": "web",  # its workers
    "-Q default": "worker",
    "-Q aggregation": "aggregator",
    "-Q inference": "inference",
    " beat": "beat",
    "manage.py": "setup",
}


class Traps:
    def __init__(self, folder: Path, *, without: tuple[str, ...] = ()) -> None:
        """`without`: beginnings of the names of points that no process of the stack comes to."""
        self.folder = folder
        self.points = {point for point in POINTS if not point.startswith(without)}
        for name in ("armed", "fired", "hits"):
            (folder / name).mkdir(parents=True)

    def arm(self, point: str, passes: int = 0) -> None:
        """Whoever reaches it after so many hits dies there."""
        new = self.folder / f"new-{point}"
        new.write_text(str(passes))
        new.rename(self.folder / "armed" / point)

    def disarm(self) -> None:
        for trap in (self.folder / "armed").iterdir():
            trap.unlink(missing_ok=True)

    @property
    def armed(self) -> set[str]:
        return {trap.name for trap in (self.folder / "armed").iterdir()}

    def hits(self) -> Counter[tuple[str, str]]:
        """Hits by point and process."""
        found: Counter[tuple[str, str]] = Counter()
        for path in (self.folder / "hits").iterdir():
            lines = path.read_text().splitlines()  # none yet, if it was made just now
            found.update((point, _name(lines[0])) for point in lines[1:])
        return found

    def fired(self) -> Counter[tuple[str, str]]:
        """Kills by point and process."""
        found: Counter[tuple[str, str]] = Counter()
        for path in (self.folder / "fired").iterdir():
            point, _, pid = path.name.rpartition("@")
            who = (self.folder / "hits" / pid).read_text().partition("\n")[0]
            found[point, _name(who)] += 1
        return found

    def table(self) -> str:
        """Every point, each process that reached it, how often, and how often it died there."""
        hits, fired = self.hits(), self.fired()
        lines = [f"{'point':30} {'process':12} {'hits':>7} {'kills':>6}"]
        for point in sorted(self.points):
            rows = sorted(process for name, process in hits if name == point)
            lines += [
                f"{point:30} {process:12} {hits[point, process]:7} {fired[point, process]:6}"
                for process in rows
            ] or [f"{point:30} {'-':12} {'NEVER':>7}"]
        return "\n".join(lines)

    def never_hit(self) -> set[str]:
        return self.points - {point for point, _ in self.hits()}


def _name(command: str) -> str:
    return next((name for part, name in PROCESSES.items() if part in command), "other")
