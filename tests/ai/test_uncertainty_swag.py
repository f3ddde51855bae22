"""Draws from moments and the moments themselves, against NumPy and the paper's formulas."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fl_server_ai.uncertainty.moments import Moments, check_moments, combine_moments
from fl_server_ai.uncertainty.swag import clamped_fraction, draw_weights, write_weights
from fl_server_core.exceptions import DomainError, Invalid

Tensors = dict[str, torch.Tensor]
DRAWS, FEW = 20_000, 4_000


def vector(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def draw(mean: Tensors, second: Tensors, number: int = 0, **more: Any) -> Tensors:
    return dict(draw_weights(mean, second, **{"seed": 0, "draw": number} | more))


def moments(count: int = 500, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(1)
    mean = {
        "w": torch.randn(count, 3, generator=generator),
        "b": torch.randn(7, generator=generator),
    }
    second = {name: tensor.square() + 0.01 for name, tensor in mean.items()}
    return {k: v.to(dtype) for k, v in mean.items()}, {k: v.to(dtype) for k, v in second.items()}


# --- the distribution ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_draws_have_the_mean_and_the_square_root_of_the_variance(scale: float) -> None:
    """The reference system passed the variance where the standard deviation belongs."""
    mean, second = {"w": vector(1.0, 0.0, -3.0)}, {"w": vector(1.25, 0.09, 13.0)}

    rows = torch.stack([draw(mean, second, k, seed=11, scale=scale)["w"] for k in range(DRAWS)])

    std = vector(0.5, 0.3, 2.0) * math.sqrt(scale)
    assert ((rows.mean(dim=0) - mean["w"]).abs() < 5 * std / math.sqrt(DRAWS)).all()
    assert ((rows.std(dim=0) - std).abs() < 5 * std / math.sqrt(2 * DRAWS)).all()
    correlation = np.corrcoef(rows.numpy().T) - np.eye(3)
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_low_rank_draws_have_the_covariance_of_the_paper() -> None:
    mean, second = (
        {"a": vector(1.0, 0.0), "b": vector(2.0)},
        {"a": vector(1.5, 1.0), "b": vector(5.0)},
    )
    columns = {
        "a": torch.tensor([[1.0, 0.5], [0.0, -1.0], [2.0, 0.0]]),
        "b": vector(1, 1, -1)[:, None],
    }

    rows = torch.stack(
        [
            torch.cat(list(draw(mean, second, k, scale=2.0, deviations=columns).values()))
            for k in range(FEW)
        ]
    )

    matrix = torch.cat([columns["a"].double(), columns["b"]], dim=1).T.numpy()
    expected = 2.0 * (np.diag([0.5, 1.0, 1.0]) / 2 + matrix @ matrix.T / (2 * (3 - 1)))
    found = np.cov(rows.numpy().T)
    spread = np.sqrt((np.outer(expected.diagonal(), expected.diagonal()) + expected**2) / FEW)
    assert (np.abs(found - expected) < 5 * spread).all()


def test_no_two_draws_are_alike() -> None:
    """The reference system drew once and repeated it N times."""
    mean, second = moments(5)

    rows = {
        tuple(draw(mean, second, k, seed=s)["w"].flatten().tolist())
        for k in range(50)
        for s in range(4)
    }

    assert len(rows) == 200


def test_tensors_with_equal_moments_are_drawn_apart() -> None:
    same = {"a": vector(0.0, 0.0), "b": vector(0.0, 0.0)}

    drawn = draw(same, {name: tensor + 1 for name, tensor in same.items()})

    assert not torch.equal(drawn["a"], drawn["b"])


def test_a_variance_below_0_by_rounding_is_raised_to_eps() -> None:
    """The reference system failed with a standard deviation that is not a number."""
    mean, second = {"w": vector(1.0, 1.0, 1.0)}, {"w": vector(1.0 - 1e-9, 1.0, 2.0)}

    rows = torch.stack([draw(mean, second, k, eps=1e-4)["w"] for k in range(2000)])

    assert rows.std(dim=0).numpy() == pytest.approx([0.01, 0.01, 1.0], rel=0.1)
    assert clamped_fraction(mean, second, 1e-4) == pytest.approx(2 / 3)
    assert torch.equal(draw(mean, second, eps=0.0)["w"][:2], mean["w"][:2])


def test_scale_0_gives_the_mean() -> None:
    mean, second = moments()

    drawn = draw(mean, second, scale=0.0)

    assert all(torch.equal(drawn[name], mean[name]) for name in mean)


# --- repeatable ------------------------------------------------------------------------------


def test_a_draw_is_the_same_alone_and_after_others() -> None:
    mean, second = moments()

    in_order = [draw(mean, second, k)["w"] for k in range(5)]

    for k in (4, 0, 2):
        assert torch.equal(draw(mean, second, k)["w"], in_order[k])
    assert torch.equal(draw({"w": mean["w"]}, {"w": second["w"]}, 3)["w"], in_order[3])


@pytest.mark.parametrize("block", [1, 7, 64, 1499, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_size_of_blocks_changes_no_bit(block: int, dtype: torch.dtype) -> None:
    mean, second = moments(500, dtype)
    columns = {name: torch.stack([tensor * 0.1, tensor * -0.3]) for name, tensor in mean.items()}

    left = draw(mean, second, 3, deviations=columns, block=block)
    right = draw(mean, second, 3, deviations=columns, block=128)

    assert all(torch.equal(left[name], right[name]) for name in mean)


# --- tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes_are_those_of_the_mean(dtype: torch.dtype) -> None:
    mean = {
        "s": torch.tensor(2.0, dtype=dtype),
        "t": torch.ones(2, 0, dtype=dtype),
        "u": torch.ones(2, 3, dtype=dtype).T,
    }
    before = {name: tensor.clone() for name, tensor in mean.items()}

    drawn = draw(mean, {name: tensor + 3 for name, tensor in mean.items()})

    assert {n: (t.shape, t.dtype) for n, t in drawn.items()} == {
        n: (t.shape, t.dtype) for n, t in mean.items()
    }
    assert all(torch.equal(mean[name], before[name]) for name in mean)


def test_buffers_are_kept_from_the_mean() -> None:
    mean = {
        "w": vector(1.0),
        "count": torch.tensor([7]),
        "mask": torch.tensor([True]),
        "running_var": vector(0.5),
        "held": vector(0.25),
    }
    second = {"w": vector(2.0), "count": torch.tensor([50]), "held": vector(2.0)}

    drawn = draw(mean, second, keep=["held"])

    assert list(drawn) == list(mean)
    assert all(torch.equal(drawn[name], mean[name]) for name in mean if name != "w")
    assert drawn["w"] != mean["w"]


def test_one_tensor_is_read_at_a_time() -> None:
    class Lazy(dict[str, torch.Tensor]):
        read: list[str] = []

        def __getitem__(self, name: str) -> torch.Tensor:
            self.read.append(name)
            return super().__getitem__(name)

    mean, second = moments(4)

    drawn = draw_weights(Lazy(mean), second, seed=0, draw=0)
    next(drawn)

    assert set(Lazy.read) == {"w"}


def test_a_model_is_filled_in_place() -> None:
    module = torch.nn.BatchNorm1d(3)
    mean = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    second = {name: mean[name] + 2 for name in ("weight", "bias")}
    drawn = draw(mean, second)
    place = module.weight.data_ptr()

    write_weights(module.state_dict(keep_vars=True), iter(drawn.items()))

    assert module.weight.data_ptr() == place
    assert all(torch.equal(module.state_dict()[name], drawn[name]) for name in drawn)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_a_draw_for_another_model_is_refused(names: list[str]) -> None:
    target = {"a": vector(1.0), "b": vector(1.0)}

    with pytest.raises(DomainError, match=r"[bc]$"):
        write_weights(target, iter([(name, vector(2.0)) for name in names]))


@pytest.mark.parametrize(
    ("second", "more", "code"),
    [
        ({"x": vector(1.0)}, {}, "KEY_MISMATCH"),
        ({"w": vector(1.0, 2.0)}, {}, "SHAPE_MISMATCH"),
        ({"w": vector(2.0)}, {"scale": -1.0}, "BAD_OPTION"),
        ({"w": vector(2.0)}, {"eps": float("nan")}, "BAD_OPTION"),
        ({"w": vector(2.0)}, {"deviations": {"w": torch.ones(1, 1)}}, "DEVIATIONS"),
        ({"w": vector(2.0)}, {"deviations": {"w": torch.ones(2, 3)}}, "SHAPE_MISMATCH"),
    ],
)
def test_bad_arguments_are_refused(second: Tensors, more: dict[str, Any], code: str) -> None:
    with pytest.raises(DomainError) as refusal:
        draw({"w": vector(1.0)}, second, **more)

    assert refusal.value.error_code == code


# --- clients' moments ------------------------------------------------------------------------


def collected(
    steps: int, size: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running means as a client keeps them, in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    mean, second = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    centre = torch.randn(size, generator=generator)
    for k in range(1, steps + 1):
        w = (centre + 1e-4 * torch.randn(size, generator=generator)).to(dtype)
        mean += (w - mean) / k
        second += (w * w - second) / k
    return mean, second


@pytest.mark.parametrize("steps", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_a_client_collects_in_its_own_dtype_is_accepted(
    steps: int, dtype: torch.dtype
) -> None:
    mean, second = collected(steps, 2000, seed=steps, dtype=dtype)

    check_moments({"w": mean}, {"w": second})


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-5, 1e15])
def test_tiny_and_large_weights_of_no_variance_are_accepted(size: float) -> None:
    mean = torch.full((3,), size)

    check_moments({"w": mean}, {"w": mean * mean})


@pytest.mark.parametrize(
    ("mean", "second", "code"),
    [
        ([[1.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 3.9]], "MOMENTS_INCONSISTENT"),
        ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, -1e-30]], "MOMENTS_INCONSISTENT"),
        ([[1.0]], [1.0], "SHAPE_MISMATCH"),
        ([[float("nan")]], [[1.0]], "NON_FINITE"),
        ([[1.0]], [[float("inf")]], "NON_FINITE"),
    ],
)
def test_moments_that_no_weights_can_have_are_refused(
    mean: list[Any], second: list[Any], code: str
) -> None:
    with pytest.raises(DomainError) as refusal:
        check_moments(
            {"a": vector(1.0), "b": torch.tensor(mean)},
            {"a": vector(1.0), "b": torch.tensor(second)},
        )

    assert refusal.value.error_code == code
    assert refusal.value.data["tensor"] == "b"
    if code == "MOMENTS_INCONSISTENT":
        assert refusal.value.data["index"] == 3


def clients(
    count: int = 3,
) -> tuple[list[Moments], list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Moments of weights that are known: a client's row weighs as many as its share of n."""
    generator = np.random.default_rng(5)
    samples = [generator.normal(k, 0.5 + k, (10, 6)) for k in range(count)]
    sizes = np.arange(1, count + 1) * 10.0
    given = [
        Moments(n, {"w": torch.tensor(s.mean(axis=0))}, {"w": torch.tensor((s**2).mean(axis=0))})
        for n, s in zip(sizes, samples, strict=True)
    ]
    return given, samples, sizes / sizes.sum()


def test_the_mixture_has_the_moments_of_all_clients_weights_together() -> None:
    given, samples, shares = clients()

    ((name, mean, second),) = combine_moments(given)

    assert name == "w"
    assert mean.dtype == second.dtype == torch.float64
    np.testing.assert_allclose(mean, np.einsum("k,kw->w", shares, [s.mean(0) for s in samples]))
    np.testing.assert_allclose(
        second, np.einsum("k,kw->w", shares, [(s**2).mean(0) for s in samples])
    )


def test_the_variance_splits_into_within_and_between_clients() -> None:
    given, samples, shares = clients()

    found = {}
    for choice in ("total", "within", "between"):
        ((_, mean, second),) = combine_moments(given, choice)
        found[choice] = (second - mean**2).numpy()

    means = np.array([s.mean(0) for s in samples])
    np.testing.assert_allclose(found["within"], shares @ np.array([s.var(0) for s in samples]))
    np.testing.assert_allclose(found["between"], shares @ (means - shares @ means) ** 2)
    np.testing.assert_allclose(found["total"], found["within"] + found["between"])


def test_clients_that_never_moved_and_agree_have_no_variance() -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    alike = Moments(3, {"w": weights}, {"w": weights * weights})

    ((_, mean, second),) = combine_moments([alike] * 7, "between")

    torch.testing.assert_close(mean, weights.double(), rtol=1e-15, atol=0)
    assert (second - mean.square()).abs().max() < 1e-15


@settings(max_examples=30, deadline=None)
@given(order=some.permutations(range(4)))
def test_the_order_of_clients_changes_rounding_only(order: list[int]) -> None:
    given, _, _ = clients(4)

    ((_, *left),) = combine_moments(given)
    ((_, *right),) = combine_moments([given[k] for k in order])

    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_buffers_without_second_moments_are_left_to_the_model() -> None:
    one = Moments(1, {"w": vector(1.0), "count": torch.tensor(3)}, {"w": vector(1.0)})

    assert [name for name, _, _ in combine_moments([one, one])] == ["w"]


def bad_clients() -> Iterator[tuple[list[Moments], str]]:
    good = Moments(1, {"w": vector(1.0)}, {"w": vector(1.0)})
    yield [], "NO_MOMENTS"
    yield [good, Moments(0, good.mean, good.second)], "SAMPLE_SIZE"
    yield [good, Moments(float("nan"), good.mean, good.second)], "SAMPLE_SIZE"
    yield [good, Moments(1, good.mean, {"v": vector(1.0)})], "KEY_MISMATCH"
    yield [good, Moments(1, {}, good.second)], "KEY_MISMATCH"
    yield [good, Moments(1, {"w": vector(1, 1)}, {"w": vector(1, 1)})], "SHAPE_MISMATCH"
    yield [good, Moments(1, {"w": vector(2.0)}, good.second)], "MOMENTS_INCONSISTENT"
    yield [good, Moments(1, {"w": torch.tensor([1])}, good.second)], "MOMENTS_INCONSISTENT"


@pytest.mark.parametrize(("given", "code"), list(bad_clients()))
def test_a_client_that_does_not_fit_is_named(given: list[Moments], code: str) -> None:
    with pytest.raises(DomainError) as refusal:
        list(combine_moments(given))

    assert refusal.value.error_code == code
    if given:
        assert refusal.value.data["client"] == 1


def test_no_second_moments_at_all_are_refused() -> None:
    with pytest.raises(DomainError):
        check_moments({"w": vector(1.0)}, {})
    with pytest.raises(Invalid):
        list(combine_moments([]))
