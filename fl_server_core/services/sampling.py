"""Who is asked in a round: drawn from the training's seed and the round's number, and from nothing else.

Everybody gets a number from SHA-256 of seed, round and id, and those with the smallest numbers are taken. That is
uniform, the same on every machine and for any order of the candidates, and who is taken does not depend on who
else has come or gone more than it must.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

KINDS = ("all", "fixed", "fraction", "poisson", "round_robin", "sticky")
COUNTED = frozenset({"fixed", "round_robin", "sticky"})  # take `count` of them
SHARED = frozenset({"fraction", "poisson"})  # take `fraction` of them


def uniform(seed: int, number: int, name: str) -> float:
    """A number in [0, 1) that is this candidate's in this round."""
    digest = hashlib.sha256(f"{seed}:{number}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def sample_goal(kind: str, *, candidates: int, count: int, fraction: float) -> int:
    """How many updates a draw of this kind aims at; for "all" and "poisson" as many as there are."""
    if kind in COUNTED:
        return min(count, candidates)
    if kind == "fraction":
        return math.ceil(round(fraction * candidates, 9))
    return candidates


def sample_draw(
    kind: str,
    candidates: Collection[str],
    *,
    seed: int,
    number: int,
    count: int = 1,
    fraction: float = 1.0,
    over: float = 1.0,
    history: Mapping[str, tuple[int, int]] | None = None,
    always: Collection[str] = (),
) -> list[str]:
    """The candidates that are asked in round `number`, sorted.

    "all"; "fixed": `count` of them; "fraction": that part of them, rounded up; "poisson": each with the
    probability `fraction`, so there may be none; "round_robin": those who were asked longest ago; "sticky":
    those of the newest round again, and others for those who have gone. `history` tells of each the last
    round and how often.

    `over` asks for so many times more than the goal, never for more than there are. `always` are
    taken first, beyond the goal if they have to be.
    """
    there = sorted(set(candidates))
    chance = {name: uniform(seed, number, name) for name in there}
    first = [name for name in there if name in always]
    rest = sorted((name for name in there if name not in always), key=lambda name: chance[name])
    if kind == "all":
        return there
    if kind == "poisson":
        return sorted([*first, *(name for name in rest if chance[name] < fraction)])
    goal = sample_goal(kind, candidates=len(there), count=count, fraction=fraction)
    wanted = min(len(there), math.ceil(round(goal * over, 9)))
    asked = history or {}
    if kind == "round_robin":  # the sorts are stable: chance decides among equals
        rest.sort(key=lambda name: asked.get(name, (-1, 0)))
    elif kind == "sticky":
        newest = max((last for last, _ in asked.values()), default=-1)
        rest.sort(key=lambda name: asked.get(name, (-2, 0))[0] != newest)
    return sorted(first + rest[: max(0, wanted - len(first))])


def spread(seconds: float, *, seed: int, number: int, name: str) -> float:
    """Half to one and a half times `seconds`, so that not everybody comes back at once."""
    return seconds * (0.5 + uniform(seed, -1 - number, name))


def adaptive_seconds(durations: Sequence[float], *, factor: float, ceiling: float) -> float:
    """`factor` times the 90th percentile (nearest rank) of how long participants took, 1 s to `ceiling`.

    With fewer than three durations there is nothing to adapt to: the ceiling.
    """
    if len(durations) < 3:
        return ceiling
    rank = math.ceil(0.9 * len(durations)) - 1
    return min(ceiling, max(1.0, factor * sorted(durations)[rank]))
