"""Sampling: seeded, reproducible, uniform, fair, and never more than there are."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fl_server_core.services.sampling import (
    KINDS,
    adaptive_seconds,
    sample_draw,
    sample_goal,
    spread,
    uniform,
)

NAMES = st.lists(st.uuids().map(str), unique=True, max_size=30)
SEEDS = st.integers(0, 2**62)
ROUNDS = st.integers(0, 10_000)
SITES = [f"site-{index:03}" for index in range(40)]


@given(kind=st.sampled_from(KINDS), names=NAMES, seed=SEEDS, number=ROUNDS, data=st.data())
def test_the_same_seed_and_round_draw_the_same_sample_in_any_order(
    kind, names, seed, number, data
) -> None:
    options = {
        "count": data.draw(st.integers(1, 40)),
        "fraction": data.draw(st.floats(0.01, 1.0)),
        "over": data.draw(st.floats(1.0, 10.0)),
        "history": {name: (data.draw(st.integers(0, 5)), 1) for name in names[::2]},
        "always": names[:2],
    }

    once = sample_draw(kind, names, seed=seed, number=number, **options)
    again = sample_draw(
        kind, data.draw(st.permutations(names)), seed=seed, number=number, **options
    )

    assert once == again
    assert set(names[:2]) <= set(once) <= set(names)
    assert len(once) == len(set(once))


@given(
    kind=st.sampled_from(["fixed", "fraction", "round_robin", "sticky"]),
    names=NAMES,
    seed=SEEDS,
    count=st.integers(1, 40),
    fraction=st.floats(0.01, 1.0),
    over=st.floats(1.0, 10.0),
)
def test_over_selection_reaches_its_size_and_never_exceeds_those_who_are_there(
    kind, names, seed, count, fraction, over
) -> None:
    goal = sample_goal(kind, candidates=len(names), count=count, fraction=fraction)

    drawn = sample_draw(kind, names, seed=seed, number=3, count=count, fraction=fraction, over=over)

    assert len(drawn) == min(len(names), math.ceil(round(goal * over, 9)))


@given(kind=st.sampled_from(KINDS), seed=SEEDS)
def test_from_nobody_nobody_is_drawn(kind, seed) -> None:
    assert sample_draw(kind, [], seed=seed, number=0) == []


def test_a_fraction_of_somebody_is_never_nobody() -> None:
    assert len(sample_draw("fraction", ["a"], seed=1, number=0, fraction=0.01)) == 1
    assert len(sample_draw("fraction", SITES[:10], seed=1, number=0, fraction=0.3)) == 3


def test_poisson_takes_each_with_its_probability() -> None:
    rounds, q = 2_000, 0.15
    sizes = [
        len(sample_draw("poisson", SITES, seed=7, number=number, fraction=q))
        for number in range(rounds)
    ]

    trials = rounds * len(SITES)
    assert abs(sum(sizes) - trials * q) < 3 * math.sqrt(trials * q * (1 - q))
    assert min(sizes) == 0 or min(sizes) < q * len(SITES) / 2  # sizes vary


def test_a_fixed_sample_is_uniform_over_the_sites() -> None:
    rounds, count = 2_000, 10
    drawn = Counter(
        name
        for number in range(rounds)
        for name in sample_draw("fixed", SITES, seed=11, number=number, count=count)
    )

    p = count / len(SITES)
    deviation = math.sqrt(rounds * p * (1 - p))
    assert all(abs(drawn[name] - rounds * p) < 4 * deviation for name in SITES)


@given(seed=SEEDS, names=st.integers(1, 25), count=st.integers(1, 25), rounds=st.integers(1, 40))
def test_round_robin_asks_nobody_twice_before_everybody_was_asked_once(
    seed, names, count, rounds
) -> None:
    there = SITES[:names]
    history: dict[str, tuple[int, int]] = {}
    asked: Counter[str] = Counter(dict.fromkeys(there, 0))
    for number in range(rounds):
        drawn = sample_draw(
            "round_robin", there, seed=seed, number=number, count=count, history=history
        )
        asked.update(drawn)
        history.update({name: (number, asked[name]) for name in drawn})

    assert max(asked.values()) - min(asked.values()) <= 1


@given(seed=SEEDS, count=st.integers(1, 20), gone=st.sets(st.sampled_from(SITES), max_size=30))
def test_a_sticky_sample_changes_only_for_those_who_have_gone(seed, count, gone) -> None:
    first = sample_draw("sticky", SITES, seed=seed, number=0, count=count)

    there = [name for name in SITES if name not in gone]
    second = sample_draw(
        "sticky", there, seed=seed, number=1, count=count, history=dict.fromkeys(first, (0, 1))
    )

    assert set(first) - gone <= set(second)
    assert len(second) == min(count, len(there))


@given(seed=SEEDS, number=ROUNDS, name=st.text(max_size=20))
def test_a_chance_is_below_one_and_a_pause_around_its_middle(seed, number, name) -> None:
    assert 0 <= uniform(seed, number, name) < 1
    assert 50 <= spread(100.0, seed=seed, number=number, name=name) < 150


def test_a_deadline_adapts_to_the_slow_but_not_beyond_its_ceiling() -> None:
    fast = [10.0] * 8 + [50.0, 900.0]

    assert adaptive_seconds(fast, factor=2.0, ceiling=3600.0) == 100.0
    assert adaptive_seconds(fast, factor=2.0, ceiling=60.0) == 60.0
    assert adaptive_seconds([0.001] * 5, factor=1.5, ceiling=60.0) == 1.0
    assert adaptive_seconds([5.0, 5.0], factor=1.5, ceiling=60.0) == 60.0
