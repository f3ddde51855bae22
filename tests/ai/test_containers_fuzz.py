"""Damaged torch files of every sort: refused with a code, or read and written again. `make fuzz` goes further."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds
from tests.fuzz.target import check

SEEDS = seeds()


@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_every_seed_is_weights(index: int) -> None:
    whole = SEEDS[index]

    # A pickle of a real file names storages that the fuzzer's archive does not have.
    assert check(whole) or whole[0] in {1, 2, 4}


def overwrite(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def insert(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at:]


def remove(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + data[at + len(piece) :]


def repeat(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + data[at : at + len(piece)] + data[at:]


CHANGES: list[Callable[[bytes, int, bytes], bytes]] = [overwrite, insert, remove, repeat]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(
        st.tuples(
            st.sampled_from(CHANGES), st.floats(0, 1), st.binary(min_size=1, max_size=8)
        ),
        min_size=1,
        max_size=4,
    ),
)  # fmt: skip
def test_damage_is_refused_with_a_code_or_does_no_harm(
    seed: bytes, changes: list[tuple[Callable[[bytes, int, bytes], bytes], float, bytes]]
) -> None:
    for change, where, piece in changes:
        seed = seed[:1] + change(seed[1:], int(where * len(seed)), piece)

    check(seed)
