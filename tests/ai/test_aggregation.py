"""The engine's promises, against NumPy and exact fractions."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.engine import Aggregated, UpdateChanged, UpdateFile, aggregate
from fl_server_core.exceptions import AggregationException
from tests.ai.meddling import a_moment_later, overwrite, replace_by_rename

Tensors = dict[str, torch.Tensor]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def write(folder: Path, models: Sequence[Tensors], sizes: Sequence[int]) -> list[UpdateFile]:
    files = []
    for index, (model, size) in enumerate(zip(models, sizes, strict=True)):
        path = folder / f"update-{index}.safetensors"
        save_file(model, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(UpdateFile(path, UpdateMeta(f"{index:03}", size), digest))
    return files


def average(folder: Path, models: Sequence[Tensors], sizes: Sequence[int], **more: Any) -> Tensors:
    strategy = more.pop("strategy", None) or STRATEGIES["FedAvg"]()
    out = folder / "out.safetensors"
    aggregate(
        **{"base": None, "device": "cpu"} | more,
        updates=write(folder, models, sizes),
        out=out,
        strategy=strategy,
    )
    return load_file(out)


def exact_mean(values: Sequence[float], sizes: Sequence[int | Fraction]) -> Fraction:
    pairs = zip(values, sizes, strict=True)
    return sum((Fraction(value) * size for value, size in pairs), Fraction()) / sum(sizes)


def random_models(n: int, seed: int = 7) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a.weight": torch.randn(37, 13, generator=generator),
            "b.half": torch.randn(211, generator=generator).half(),
            "c.double": torch.randn(101, generator=generator, dtype=torch.float64),
            "d.count": torch.randint(-1000, 1000, (55,), generator=generator),
            "e.mask": torch.rand(19, generator=generator) < 0.5,
            "f.scalar": torch.randn((), generator=generator),
            "g.empty": torch.zeros(0, 4),
        }
        for _ in range(n)
    ]


# Copied from the project's shared test vectors: fedavg_weighted, fedavg_uniform.
VECTOR_MODELS = [
    {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [0.0, 1.0]},
    {"a": [[2.0, 0.0], [1.0, -1.0]], "b": [2.0, -1.0]},
    {"a": [[-1.0, 1.0], [0.0, 2.0]], "b": [1.0, 0.5]},
]
VECTORS = {
    "samples": {"a": [[-0.2, 0.9], [0.5, 1.6]], "b": [1.1, 0.25]},
    "uniform": {"a": [[2 / 3, 1.0], [4 / 3, 5 / 3]], "b": [1.0, 1 / 6]},
}


@pytest.mark.parametrize("name", ["FedAvg", "FedProx"])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_published_vectors_come_out(tmp_path: Path, name: str, weighting: str) -> None:
    models = [
        {key: torch.tensor(value, dtype=torch.float64) for key, value in model.items()}
        for model in VECTOR_MODELS
    ]
    kind = STRATEGIES[name]

    got = average(tmp_path, models, [10, 20, 70], strategy=kind(kind.Options(weighting=weighting)))

    for key, expected in VECTORS[weighting].items():
        np.testing.assert_allclose(got[key].numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("odd", [0, 1])
def test_a_narrow_mean_is_rounded_once_also_right_beside_the_middle(
    tmp_path: Path, dtype: torch.dtype, odd: int
) -> None:
    step = torch.finfo(dtype).eps
    low, high = 1 + odd * step, 1 + (odd + 1) * step
    models = [{"w": torch.full((40,), one, dtype=torch.float64).to(dtype)} for one in (low, high)]

    above = average(tmp_path, models, [2**20, 2**20 + 1])["w"]
    below = average(tmp_path, models, [2**20 + 1, 2**20])["w"]

    assert set(above.double().tolist()) == {high}  # by way of float32 they would be the even one
    assert set(below.double().tolist()) == {low}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sparse_updates_that_are_alike_give_back_their_own_bytes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(500, generator=generator, dtype=torch.float64).to(dtype)
    numbers[0] = -0.0
    save_file({"w": numbers * 0 + 1}, tmp_path / "base")
    save_file({"mask.0": torch.ones(500, dtype=torch.uint8)}, tmp_path / "mask")
    files = write(tmp_path, [{"w": numbers}] * 3, [1, 3, 1_000_003])
    files = [replace(file, mask=tmp_path / "mask") for file in files]

    aggregate(
        base=tmp_path / "base", updates=files, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]()
    )

    assert (tmp_path / "out").read_bytes() == files[0].path.read_bytes()


def test_a_float64_mean_is_correctly_rounded_even_when_terms_cancel(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    big = generator.standard_normal(200) * 1e12
    rows = [big, -big, generator.standard_normal(200), generator.standard_normal(200)]

    got = average(tmp_path, [{"w": torch.from_numpy(row.copy())} for row in rows], [7, 7, 3, 11])

    for index, value in enumerate(got["w"].numpy()):
        exact = exact_mean([float(row[index]) for row in rows], [7, 7, 3, 11])
        assert abs(Fraction(float(value)) - exact) <= Fraction(float(np.spacing(abs(value)))) / 2


LARGEST, SMALLEST = float(np.finfo(np.float64).max), 2.0**-1074
HUGE = [
    [1e305, 1.0, -3.0], [1e305, SMALLEST, -SMALLEST], [1e305, -1e305, 1.0], [1.7e308] * 3,
    [LARGEST] * 3, [-LARGEST] * 3, [LARGEST, LARGEST, -LARGEST], [1e300, 1e-300, 1e300],
    [LARGEST, -LARGEST, 1e300],
]  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1], [10, 20, 70], [2**31] * 3, [2**31, 2**31, 1]], ids=str
)
def test_every_finite_float64_is_averaged_and_correctly_rounded(
    tmp_path: Path, sizes: list[int]
) -> None:
    rows = np.array(HUGE).T

    got = average(tmp_path, [{"w": torch.from_numpy(row.copy())} for row in rows], sizes)

    for values, mean in zip(HUGE, got["w"].tolist(), strict=True):
        off = abs(Fraction(mean) - exact_mean(values, sizes))
        assert off <= Fraction(math.ulp(mean)) / 2, values


def test_a_huge_number_changes_no_other_and_one_that_is_none_is_still_found(
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(500, generator=generator, dtype=torch.float64) for _ in range(3)]
    rows[0][7] = SMALLEST
    alone = average(tmp_path, [{"w": row} for row in rows], [3, 5, 2**31])["w"]
    rows[0][100], rows[1][101] = 1e305, LARGEST

    beside = average(tmp_path, [{"w": row} for row in rows], [3, 5, 2**31])["w"]

    others = [index for index in range(500) if index not in (100, 101)]
    assert torch.equal(alone[others].view(torch.int64), beside[others].view(torch.int64))
    rows[2][102] = torch.inf
    with pytest.raises(AggregationException, match="002 has NaN or infinity in 'w'"):
        average(tmp_path, [{"w": row} for row in rows], [3, 5, 2**31])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_updates_that_are_alike_give_back_their_own_bytes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(999, generator=generator, dtype=torch.float64) * 1000).to(dtype)
    tensor[:3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal])
    if dtype != torch.float64:
        tensor[3] = torch.finfo(dtype).max
    model = {"w": tensor}

    files = write(tmp_path, [model] * 5, [1, 3, 1_000_003, 2**40 + 1, 17])
    done = aggregate(
        base=None, updates=files, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]()
    )

    assert (tmp_path / "out").read_bytes() == files[0].path.read_bytes()
    assert done.digest == files[0].sha256


def test_order_block_size_and_threads_never_show_in_the_bytes(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(7), [3, 1, 4, 1, 5, 9, 2])

    digests = {
        aggregate(
            base=None,
            updates=list(order),
            out=tmp_path / "out",
            strategy=strategy,
            block=block,
            threads=threads,
            device="cpu",
        ).digest
        for strategy in [Fractional()]
        for order in (files, files[::-1], files[3:] + files[:3])
        for block in (1, 33, 131_072)
        for threads in (1, 3)
    }

    assert len(digests) == 1


def test_sixty_thousand_samples_do_not_overflow_half_precision(tmp_path: Path) -> None:
    models = [{"w": torch.full((4,), 60_000.0).half()} for _ in range(3)]

    got = average(tmp_path, models, [60_000, 60_000, 1])

    assert torch.equal(got["w"], models[0]["w"])


def test_inputs_are_left_as_they_were(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(3), [1, 2, 3])
    for file in files:
        file.path.chmod(0o400)
    before = [file.path.read_bytes() for file in files]

    aggregate(base=None, updates=files, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]())

    assert [file.path.read_bytes() for file in files] == before


def test_the_digest_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(2), [1, 2])
    out = tmp_path / "out"

    done = aggregate(base=None, updates=files, out=out, strategy=STRATEGIES["FedAvg"]())

    assert done == Aggregated(
        hashlib.sha256(out.read_bytes()).hexdigest(), out.stat().st_size, 2, 3.0, []
    )


@pytest.mark.parametrize("sizes", [[0, 0], [1, -1], [float("nan"), 1], [1, 1.5], [True, 1]])
def test_sample_sizes_that_are_no_count_are_refused(tmp_path: Path, sizes: list[Any]) -> None:
    models = [{"w": torch.ones(2)}] * 2

    with pytest.raises(AggregationException, match="participant 00"):
        average(tmp_path, models, sizes)

    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_number_that_is_none_names_its_sender(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    models = [{"v": torch.ones(9, dtype=dtype), "w": torch.ones(9, dtype=dtype)} for _ in range(3)]
    models[1]["w"][4] = value

    with pytest.raises(AggregationException, match="participant 001 has NaN or infinity in 'w'"):
        average(tmp_path, models, [1, 1, 1])

    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


OTHERS: dict[str, Tensors] = {
    "tensor 'b' is not in the other files": {"a": torch.ones(2), "b": torch.ones(2)},
    "tensor 'a' is missing": {"b": torch.ones(2)},
    r"tensor 'a' has shape \[3\]": {"a": torch.ones(3)},
    "tensor 'a' has dtype F16": {"a": torch.ones(2).half()},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_tensors_are_refused_with_name_and_reason(tmp_path: Path, reason: str) -> None:
    models = [{"a": torch.ones(2)}, OTHERS[reason]]

    with pytest.raises(AggregationException, match=f"participant 001 .*{reason}"):
        average(tmp_path, models, [1, 1])


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "update"
    path.write_bytes((4).to_bytes(8, "little") + b"junk")
    files = [UpdateFile(path, UpdateMeta("ada", 1))]

    with pytest.raises(AggregationException, match="participant ada cannot be read"):
        aggregate(base=None, updates=files, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]())


def test_a_dtype_without_a_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AggregationException, match="C64"):
        average(tmp_path, [{"w": torch.ones(2, dtype=torch.complex64)}], [1])


def test_an_update_that_disappeared_is_named(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(3), [1, 1, 1])
    files[2].path.unlink()

    with pytest.raises(UpdateChanged) as refusal:
        aggregate(base=None, updates=files, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]())

    assert refusal.value.participant == "002"


def damage_digest(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("change", [damage_digest, cut, empty])
def test_an_update_that_is_not_the_accepted_one_is_named(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    files = write(tmp_path, random_models(3), [1, 1, 1])
    change(files[1].path)

    with pytest.raises(UpdateChanged) as refusal:
        aggregate(
            base=None,
            updates=files,
            out=tmp_path / "out",
            strategy=STRATEGIES["FedAvg"](),
            verify=True,
        )

    assert refusal.value.participant == "001"


class Meddler(Strategy[Any]):
    """Does something to a file in the middle of the pass."""

    state_blocks = ("m",)
    victim: Path
    harm: Callable[[Path], None] | None = None

    def update(self, x: torch.Tensor, y: torch.Tensor, state: Any) -> torch.Tensor:
        if self.harm is not None:
            harm, self.harm = self.harm, None
            harm(self.victim)
        return y


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("victim", ["update", "base", "state"])
@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("harm", [append, overwrite, replace_by_rename, Path.unlink])
def test_a_file_that_changes_during_the_pass_is_noticed(
    tmp_path: Path, harm: Callable[[Path], None], n: int, victim: str
) -> None:
    files = write(tmp_path, [{"w": torch.ones(8)}] * 2, [1] * 2)
    many = [replace(files[k > 0], meta=UpdateMeta(f"{k:03}", 1)) for k in range(n)]
    places = {"update": files[1].path, "base": tmp_path / "base", "state": tmp_path / "state"}
    strategy = Meddler()
    strategy.victim = places[victim]
    save_file({"w": torch.ones(8)}, places["base"])
    save_file({"m.0": torch.ones(8)}, places["state"])
    a_moment_later(strategy.victim)
    strategy.harm = harm

    with pytest.raises(UpdateChanged):
        aggregate(
            base=places["base"],
            updates=many,
            out=tmp_path / "out",
            strategy=strategy,
            state_in=places["state"],
            block=4,
            threads=1,
        )

    assert strategy.harm is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [2, 300])
def test_a_second_name_that_goes_during_the_pass_is_no_change(tmp_path: Path, n: int) -> None:
    files = write(tmp_path, [{"w": torch.ones(8)}] * 2, [1] * 2)
    strategy = Meddler()
    strategy.victim = tmp_path / "upload"
    strategy.victim.hardlink_to(files[1].path)
    a_moment_later(files[1].path)
    strategy.harm = Path.unlink
    many = [replace(files[k > 0], meta=UpdateMeta(f"{k:03}", 1)) for k in range(n)]

    aggregate(base=files[0].path, updates=many, out=tmp_path / "out", strategy=strategy, threads=1)

    assert strategy.harm is None


class GiveUp(Exception):
    """What a caller raises who lost its lease."""


def test_a_failure_leaves_the_old_result_and_no_litter(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(3), [1, 1, 1])
    out = tmp_path / "out"
    out.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())

    def progress(done: int, total: int) -> None:
        raise GiveUp

    with pytest.raises(GiveUp):
        aggregate(
            base=None,
            updates=files,
            out=out,
            strategy=STRATEGIES["FedAvg"](),
            progress=progress,
        )

    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


def test_progress_ends_with_all_blocks(tmp_path: Path) -> None:
    files = write(tmp_path, [{"w": torch.ones(100)}] * 2, [1, 1])
    calls: list[tuple[int, int]] = []

    aggregate(
        base=None,
        updates=files,
        out=tmp_path / "out",
        strategy=STRATEGIES["FedAvg"](),
        progress=lambda done, total: calls.append((done, total)),
        block=10,
    )

    assert calls[-1] == (10, 10)
    assert calls == sorted(calls)


def test_more_updates_than_files_may_be_open(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([float(index)])} for index in range(300)]

    got = average(tmp_path, models, [1] * 300)

    assert got["w"].item() == 149.5


def test_the_setting_of_torch_threads_is_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()

    average(tmp_path, random_models(2), [1, 1])

    assert torch.get_num_threads() == before


def test_a_missing_gpu_becomes_a_warning(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(2), [1, 1])

    done = aggregate(
        base=None,
        updates=files,
        out=tmp_path / "out",
        strategy=STRATEGIES["FedAvg"](),
        device="cuda:99",
    )

    assert done.warnings == ["cuda:99 is not available; aggregated on the CPU"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_bytes_for_exact_weights(tmp_path: Path) -> None:
    files = write(tmp_path, random_models(5), [1, 2, 3, 4, 5])

    digests = {
        aggregate(
            base=None,
            updates=files,
            out=tmp_path / "out",
            strategy=STRATEGIES["FedAvg"](),
            device=device,
        ).digest
        for device in ("cpu", "cuda")
    }

    assert len(digests) == 1


class Fractional(Strategy[Any]):
    """Weights that are no whole numbers."""

    def weights(self, metas: Sequence[UpdateMeta], gram: Any) -> Sequence[float]:
        return [1 / (1 + meta.num_examples) ** 0.5 for meta in metas]


def test_fractional_weights_follow_the_same_rule(tmp_path: Path) -> None:
    models, sizes = random_models(6), [3, 1, 4, 1, 5, 9]

    got = average(tmp_path, models, sizes, strategy=Fractional())

    weights = [1 / (1 + size) ** 0.5 for size in sizes]
    expected = np.average([model["a.weight"].double() for model in models], 0, weights)
    np.testing.assert_array_equal(got["a.weight"], expected.astype(np.float32))


class Only(Strategy[Any]):
    """Weight one for a single participant, as Krum does."""

    def weights(self, metas: Sequence[UpdateMeta], gram: Any) -> Sequence[float]:
        return [float(meta.participant == "001") for meta in metas]


def test_an_update_of_weight_zero_is_not_read(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([float("nan")])}, {"w": torch.tensor([2.0])}]

    got = average(tmp_path, models, [5, 5], strategy=Only())

    assert got["w"].item() == 2.0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [1.0]])
def test_weights_that_cannot_be_used_are_refused(tmp_path: Path, weights: list[float]) -> None:
    class Broken(Strategy[Any]):
        def weights(self, metas: Sequence[UpdateMeta], gram: Any) -> Sequence[float]:
            return weights

    with pytest.raises(AggregationException, match="weight"):
        average(tmp_path, [{"w": torch.ones(1)}] * 2, [1, 1], strategy=Broken())


class Median(Strategy[Any]):
    """Coordinate-wise median of an odd number of updates."""

    def reduce(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.median(dim=0).values


@pytest.mark.parametrize("block", [1, 10, 131_072])
def test_a_coordinate_wise_rule_sees_all_updates_of_a_block(tmp_path: Path, block: int) -> None:
    models = random_models(5)

    got = average(tmp_path, models, [1] * 5, strategy=Median(), block=block)

    for name in ("a.weight", "b.half", "c.double", "f.scalar"):
        expected = np.median(np.stack([model[name].numpy() for model in models]), axis=0)
        np.testing.assert_array_equal(got[name].numpy(), expected)


class Momentum(Strategy[Any]):
    """m = m/2 + (y - x); x' = x + m; counts its rounds."""

    state_blocks = ("m",)
    rounds = 0

    def weights(self, metas: Sequence[UpdateMeta], gram: Any) -> Sequence[float]:
        self.rounds += 1
        return super().weights(metas, gram)

    def update(
        self, x: torch.Tensor, y: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        state["m"] = state["m"] * 0.5 + (y - x)
        return x + state["m"]

    def initial_state(self) -> Mapping[str, float]:
        return {"m": 0.25}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]


@pytest.mark.parametrize("block", [7, 131_072])
def test_state_carries_over_from_round_to_round(tmp_path: Path, block: int) -> None:
    base = {"v": torch.arange(20.0), "w": torch.arange(30.0, dtype=torch.float64)}
    models = [{name: tensor + 1 + k for name, tensor in base.items()} for k in range(2)]
    save_file(base, tmp_path / "base")
    files = write(tmp_path, models, [1, 1])
    current, state = tmp_path / "base", None
    expected = {name: tensor.double().numpy() for name, tensor in base.items()}
    m = {name: np.full(tensor.shape, 0.25) for name, tensor in base.items()}

    for round in range(3):
        strategy = Momentum()
        out, state_out = tmp_path / f"x{round}", tmp_path / f"s{round}"
        aggregate(
            base=current,
            updates=files,
            out=out,
            strategy=strategy,
            state_in=state,
            state_out=state_out,
            block=block,
        )
        current, state = out, state_out
        for name in expected:
            m[name] = m[name] * 0.5 + (base[name].double().numpy() + 1.5 - expected[name])
            expected[name] = expected[name] + m[name]

    got = load_file(current)
    for name in expected:
        np.testing.assert_allclose(got[name].numpy(), expected[name], rtol=1e-6)
    assert strategy.rounds == 3
    assert set(load_file(state_out)) == {"m.0", "m.1"}


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"m.0": torch.ones(3)}, tmp_path / "state", metadata={"scalars": "{}"})
    save_file({"w": torch.ones(4)}, tmp_path / "base")

    with pytest.raises(AggregationException, match="another model"):
        average(
            tmp_path,
            [{"w": torch.ones(4)}],
            [1],
            strategy=Momentum(),
            base=tmp_path / "base",
            state_in=tmp_path / "state",
        )


def test_a_rule_that_moves_from_the_base_must_have_it(tmp_path: Path) -> None:
    with pytest.raises(AggregationException, match="needs the base"):
        average(tmp_path, [{"w": torch.ones(4)}], [1], strategy=Momentum())


class Comparing(Strategy[Any]):
    """Keeps the Gram matrix it was given."""

    needs_gram = True
    seen: torch.Tensor

    def weights(self, metas: Sequence[UpdateMeta], gram: Any) -> Sequence[float]:
        self.seen = gram
        return super().weights(metas, gram)


def test_the_gram_matrix_is_that_of_all_floats_and_of_any_threads(tmp_path: Path) -> None:
    base, *models = random_models(5)
    save_file(base, tmp_path / "base")
    names = ("a.weight", "b.half", "c.double", "f.scalar")
    seen = []

    for threads in (1, 3):
        strategy = Comparing()
        average(
            tmp_path,
            models,
            [1] * 4,
            strategy=strategy,
            base=tmp_path / "base",
            threads=threads,
        )
        seen.append(strategy.seen)

    deltas = np.stack(
        [
            np.concatenate([(m[n].double() - base[n].double()).flatten().numpy() for n in names])
            for m in models
        ]
    )
    np.testing.assert_allclose(seen[0].numpy(), deltas @ deltas.T, rtol=1e-12)
    assert torch.equal(seen[0], seen[1])
