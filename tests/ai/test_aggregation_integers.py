"""Integer and bool buffers, against exact fractions."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fl_server_ai.aggregation.integers import combine

INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


@pytest.mark.parametrize("dtype", INTEGERS)
@given(data=some.data())
def test_a_mean_is_exact_with_halves_to_even(dtype: str, data: some.DataObject) -> None:
    info = np.iinfo(dtype)
    numbers = some.integers(int(info.min), int(info.max)) | some.integers(0, 9)
    values = data.draw(some.lists(numbers, min_size=1, max_size=5))
    one = some.integers(1, 2**40) | some.floats(0.001, 1e6)
    weights = data.draw(some.lists(one, min_size=len(values), max_size=len(values)))

    got = combine(np.array(values, dtype=dtype)[:, None], weights, "mean", None)

    total = sum(Fraction(weight) for weight in weights)
    pairs = zip(values, weights, strict=True)
    exact = sum((value * Fraction(weight) for value, weight in pairs), Fraction()) / total
    assert got.dtype == dtype
    assert int(got[0]) == round(exact)


def test_the_published_vector_of_a_counter() -> None:  # dtype_integer_buffer
    rows = np.array([[10], [11], [14]], dtype=np.int64)

    assert combine(rows, [1, 1, 2], "mean", None).tolist() == [12]


def test_counters_beyond_the_exact_floats_keep_their_last_digit() -> None:
    rows = np.full((3, 2), 2**60 + 1, dtype=np.int64)

    assert combine(rows, [5, 7, 11], "mean", None).tolist() == [2**60 + 1] * 2


@pytest.mark.parametrize(
    ("policy", "expected"), [("max", [9, -2]), ("keep", [5, 5])], ids=["max", "keep"]
)
def test_other_policies(policy: str, expected: list[int]) -> None:
    rows = np.array([[1, -3], [9, -2]], dtype=np.int32)

    got = combine(rows, [100, 1], policy, np.array([5, 5], dtype=np.int32))

    assert got.tolist() == expected


def test_keep_without_a_base_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the base"):
        combine(np.zeros((1, 1), dtype=np.int8), [1], "keep", None)


@pytest.mark.parametrize(
    ("weights", "base", "expected"),
    [
        ([1, 1, 3], None, [False, True]),
        ([2, 1, 3], None, [True, True]),
        ([2, 1, 3], [False, False], [False, True]),
    ],
    ids=["majority", "tie without a base", "tie with a base"],
)
def test_bools_vote(weights: list[int], base: Any, expected: list[bool]) -> None:
    rows = np.array([[True, False], [True, True], [False, True]])

    got = combine(rows, weights, "mean", None if base is None else np.array(base))

    assert got.tolist() == expected
