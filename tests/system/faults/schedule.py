"""A seeded schedule of kills, at points and at random times, and the run that must not notice it."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.system.faults.clients import OUTAGES, Hook, quiet
from tests.system.faults.lanes import Lane
from tests.system.faults.stacks import Embedded, Production, Stack
from tests.system.faults.ways import all_lanes, few_lanes

STACKS: dict[str, Callable[..., Stack]] = {"embedded": Embedded, "production": Production}
ARMED = 4  # points at a time
POINT_SECONDS = 60.0  # that they are waited for before one more is armed
FEW_POINTS = ("round.deadline.commit:before", "update.accept.commit:after", "answer.task:before")
PROGRESS_SECONDS = 240.0
CALM_SECONDS = 300.0


@dataclass(frozen=True)
class Fault:
    """Processes that die together after a pause, and how long they stay down; or a point and its hit."""

    targets: tuple[str, ...] = ()
    pause: float = 0.0
    down: float = 0.0
    point: str = ""
    passes: int = 0

    def __str__(self) -> str:
        if self.point:
            return f"at {self.point} after {self.passes}"
        return f"{' and '.join(self.targets)} after {self.pause:.2f} s, down {self.down:.2f} s"


def schedule(stack: Stack, seed: int, count: int) -> list[Fault]:
    """Half of them at points, each point once before any comes again; the others at random times.

    The stacks go through the points from different ends: together they come to more of them.
    """
    draw = random.Random(seed)  # noqa: S311 - repeatable, and no secret
    order = draw.sample(sorted(stack.traps.points), len(stack.traps.points))
    if isinstance(stack, Embedded):
        order.reverse()
    faults = []
    points: list[str] = []
    for number in range(count):
        if number % 2:
            if not points:
                points = list(order)
            faults.append(Fault(point=points.pop(), passes=draw.choice([0, 0, 0, 1, 3])))
            continue
        together = draw.choices([1, 2, 3], [6, 3, 1])[0]
        targets = draw.sample(stack.targets, min(together, len(stack.targets)))
        faults.append(Fault(tuple(targets), draw.uniform(0, 1.5), draw.choice([0.0, 0.3, 1.0])))
    return faults


def short_schedule(stack: Stack, seed: int) -> list[Fault]:
    """Every process once, some of them together, and a few points."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, and no secret
    targets = draw.sample(stack.targets, len(stack.targets))
    size = (len(targets) + 2) // 3
    kills = [
        Fault(tuple(targets[at : at + size]), draw.uniform(0, 1))
        for at in range(0, len(targets), size)
    ]
    return [*(Fault(point=point) for point in FEW_POINTS), *kills]


class Run:
    """Lanes on a stack that is up: once undisturbed, then under faults, then to their end.

    A short one has few lanes, whose results NumPy knows, and no undisturbed part.
    """

    def __init__(
        self, kind: str, seed: int, count: int, stack: Stack, *, short: bool = False
    ) -> None:
        self.kind, self.seed, self.count, self.short = kind, seed, count, short
        self.stack, self.folder = stack, stack.folder
        self.faults = short_schedule(stack, seed) if short else schedule(stack, seed, count)
        self.done: list[str] = []
        self.unreached: list[str] = []
        self._stop, self._last = threading.Event(), threading.Event()

    def run(self) -> str:
        """The report; AssertionError with seed and command if anything went wrong."""
        quiet()
        hook = Hook()
        began = time.monotonic()
        try:
            with self._reported():
                with self._lanes(hook) as working:
                    if not self.short:
                        self._until_turn(working, 1, "the undisturbed run")
                    calm = time.monotonic() - began
                    for fault in self.faults:
                        self._strike(fault, working)
                    self._await_traps(0, working)
                    self.unreached = sorted(self.stack.traps.armed)
                    self.stack.traps.disarm()
                for lane in working:
                    lane.check()
                    lane.close()
                assert not OUTAGES["500"], f"an outage is no bug of the server: {dict(OUTAGES)}"
                again = self._asked_again()
                assert again, "no deadline has passed"
                report = self._report(working, calm, time.monotonic() - began, again)
                never = self.unreached if self.short else sorted(self.stack.traps.never_hit())
                assert not never, f"never hit: {never}"
        finally:
            self._stop.set()
            hook.close()
        return report

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            raise AssertionError(
                f"{error!r}\nafter {len(self.done)} faults, the last: {self.done[-5:]}\n"
                f"repeat it with: {self.command}\n{self.stack.traps.table()}\n{self.stack.logs()}"
            ) from error

    @property
    def command(self) -> str:
        return f"python -m tests.system.faults {self.kind} --seed {self.seed} --faults {self.count}"

    @contextlib.contextmanager
    def _lanes(self, hook: Hook) -> Iterator[list[Lane]]:
        """All lanes at work; at the end each ends its turn, undisturbed."""
        ways = few_lanes if self.short else all_lanes
        working = ways(self.stack, self._stop, self.folder, hook)
        threads = [
            threading.Thread(target=self._drive, args=(lane,), daemon=True) for lane in working
        ]
        for thread in threads:
            thread.start()
        try:
            yield working
        finally:
            self._last.set()
        end = time.monotonic() + CALM_SECONDS
        for thread, lane in zip(threads, working, strict=True):
            thread.join(max(0.0, end - time.monotonic()))
            self._check(working)
            assert not thread.is_alive(), f"{lane.name} did not end within {CALM_SECONDS:.0f} s"

    def _drive(self, lane: Lane) -> None:
        try:
            while not self._last.is_set():
                lane.turn()
        except BaseException as error:  # noqa: BLE001 - told by the run's own thread
            lane.error = error

    def _check(self, working: list[Lane]) -> None:
        for lane in working:
            if lane.error is not None:
                raise AssertionError(f"lane {lane.name}, turn {lane.turns}") from lane.error

    def _until_turn(self, working: list[Lane], turns: int, what: str) -> None:
        self._wait(lambda: min(lane.turns for lane in working) >= turns, what, working)

    def _wait(self, promise: Callable[[], bool], what: str, working: list[Lane]) -> None:
        end = time.monotonic() + PROGRESS_SECONDS
        while not promise():
            self._check(working)
            assert time.monotonic() < end, f"{PROGRESS_SECONDS:.0f} s passed without {what}"
            time.sleep(0.05)

    def _strike(self, fault: Fault, working: list[Lane]) -> None:
        if fault.point:
            self._trap(fault, working)
            return
        time.sleep(fault.pause)
        before = sum(self.stack.traps.hits().values())
        for target in fault.targets:
            self.stack.kill(target)
        time.sleep(fault.down)
        for target in fault.targets:
            self.stack.start(target)
        self.done.append(str(fault))
        # Some work between two kills, or nothing would ever be in the middle of anything.
        self._wait(lambda: sum(self.stack.traps.hits().values()) > before + 30, "progress", working)

    def _trap(self, fault: Fault, working: list[Lane]) -> None:
        """Armed as soon as there is room; whoever steps on it does so in his own time."""
        self._await_traps(ARMED - 1, working)
        self.stack.traps.arm(fault.point, fault.passes)
        self.done.append(str(fault))

    def _await_traps(self, most: int, working: list[Lane]) -> None:
        """Until no more than so many are armed; a rare one is not waited for for ever."""
        end = time.monotonic() + POINT_SECONDS
        while len(self.stack.traps.armed) > most and time.monotonic() < end:
            self._check(working)
            time.sleep(0.05)

    def _asked_again(self) -> int:
        """Parts that were late, or failed, and were asked for again."""
        ((count,),) = self.stack.rows("SELECT count(*) FROM fl_server_core_task WHERE attempt > 1")
        return int(str(count))

    def _report(self, working: list[Lane], calm: float, seconds: float, again: int) -> str:
        turns = ", ".join(f"{lane.name} {lane.turns}" for lane in working)
        fired = sum(self.stack.traps.fired().values())
        kills = len(self.done) - sum(bool(fault.point) for fault in self.faults) + fired
        return (
            f"{self.stack.traps.table()}\n\n{self.kind}, seed {self.seed}: {kills} faults "
            f"({fired} at points; armed in vain: {self.unreached}), "
            f"{seconds:.0f} s (undisturbed {calm:.0f} s)\nturns: {turns}\nparts asked for again: {again}\nclients saw: {dict(OUTAGES)}\n{self.command}"
        )
