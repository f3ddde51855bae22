"""What goes beside the weights in both directions, what a site remembers, and smaller updates."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load, save
from safetensors.torch import load as torch_load
from safetensors.torch import save as torch_save

import fl_client
from fl_client import Client, Context, FitResult, Scaffold, encodings, fednova, personal, prox
from fl_client.arrays import BFloat16
from fl_server_ai.received.numbers import narrowed, widened
from tests.client.fake_server import Asked, FakeServer, Reply, refusal

V = np.array([0.6, -0.8, 0.0, 1.2])


def context(folder: Path, round: int = 0, **extras: Any) -> Context:
    task = {"id": "t", "round": round}
    return Context(task, lambda _: {}, extras=extras, folder=folder)


def array(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, np.float32)}


# Learning rate 0.1, ten steps; peers' example: c and c_k are 0, x is 0 and y is -1.
def test_scaffolds_first_round_is_the_published_example(tmp_path: Path) -> None:
    scaffold = Scaffold(context(tmp_path), array(0.0))

    assert scaffold.correction["w"].tolist() == [0.0]
    assert scaffold.finish(array(0.0), array(-1.0), lr_sum=1.0)["w"].tolist() == [1.0]


def test_the_control_variate_is_there_in_the_next_round_of_another_process(tmp_path: Path) -> None:
    Scaffold(context(tmp_path), array(0.0)).finish(array(0.0), array(-1.0), 1.0)

    servers = {"scaffold.c": {"w": np.array([0.25], np.float32)}}
    again = Scaffold(
        Context({"round": 1}, lambda _: {}, extras=servers, folder=tmp_path), array(-1.0)
    )

    assert again.correction["w"].tolist() == [0.25 - 1.0]
    # c_k' = c_k - c + (x - y) / lr_sum = 1 - .25 + (-1 + 2) / 2 = 1.25
    assert again.finish(array(-1.0), array(-2.0), 2.0)["w"].tolist() == [0.25]


def test_a_round_that_is_made_twice_begins_both_times_with_the_same(tmp_path: Path) -> None:
    Scaffold(context(tmp_path), array(0.0)).finish(array(0.0), array(-1.0), 1.0)

    made = [
        Scaffold(context(tmp_path, 1), array(0.0))
        .finish(array(0.0), array(-3.0), 1.0)["w"]
        .tolist()
        for _ in range(2)
    ]

    assert made[0] == made[1] == [3.0]


def told(folder: Path, round: int, *, unused: list[int], undecided: list[int]) -> Context:
    own = {"unused": unused, "undecided": undecided}
    return Context({"id": "t", "round": round, "own_updates": own}, lambda _: {}, folder=folder)


def control(context: Context) -> list[float]:
    """c_k, where the server's c is zero."""
    return [-value for value in Scaffold(context, array(0.0)).correction["w"].tolist()]


def test_a_change_that_was_not_used_is_taken_back(tmp_path: Path) -> None:
    for round, end in enumerate([-1.0, -4.0]):
        Scaffold(context(tmp_path, round), array(0.0)).finish(array(0.0), array(end), 1.0)

    assert control(told(tmp_path, 2, unused=[], undecided=[])) == [5.0]
    assert control(told(tmp_path, 2, unused=[1], undecided=[])) == [1.0]


def test_a_change_is_taken_back_also_when_that_is_known_only_rounds_later(tmp_path: Path) -> None:
    Scaffold(context(tmp_path, 0), array(0.0)).finish(array(0.0), array(-1.0), 1.0)
    for round, end in ((1, -4.0), (2, -16.0)):
        Scaffold(told(tmp_path, round, unused=[], undecided=[0]), array(0.0)).finish(
            array(0.0), array(end), 1.0
        )

    assert control(told(tmp_path, 3, unused=[], undecided=[])) == [21.0]
    assert control(told(tmp_path, 3, unused=[0], undecided=[])) == [20.0]
    assert control(told(tmp_path, 3, unused=[0, 2], undecided=[])) == [4.0]


def test_several_rounds_in_vain_do_not_cost_what_came_before(tmp_path: Path) -> None:
    Scaffold(context(tmp_path, 0), array(0.0)).finish(array(0.0), array(-1.0), 1.0)
    for round in (1, 2, 3):
        vain = told(tmp_path, round, unused=list(range(1, round)), undecided=[])
        Scaffold(vain, array(0.0)).finish(array(0.0), array(-9.0), 1.0)

    assert control(told(tmp_path, 4, unused=[1, 2, 3], undecided=[])) == [1.0]
    assert len(list(tmp_path.rglob("scaffold-*"))) == 2


def test_running_variances_have_no_control_variate(tmp_path: Path) -> None:
    start = {"bn.running_var": np.ones(1, np.float32), **array(0.0)}
    end = {"bn.running_var": np.zeros(1, np.float32), **array(-1.0)}

    for round in range(2):
        scaffold = Scaffold(context(tmp_path, round), start)

        assert scaffold.correction["bn.running_var"].tolist() == [0.0]
        assert list(scaffold.finish(start, end, 1.0)) == ["w"]


class WithScaffold(Client):
    """One step of size one."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> FitResult:
        self.seen.append({name: dict(value) for name, value in context.extras.items()})
        scaffold = Scaffold(context, weights)
        end = {n: w - 0.5 + scaffold.correction[n] for n, w in weights.items()}
        dc = scaffold.finish(weights, end, 1.0)
        return FitResult(end, 7, num_steps=1, extras={"scaffold.dc": dc, "prox.loss": 0.25})


pytestmark = pytest.mark.enable_socket


def offer(server: FakeServer, round: int) -> None:
    data = save({"extra.scaffold.c.w": np.full((2, 3), 0.5, np.float32)})
    server.routes["GET", "/api/models/m/extras/"] = lambda _: Reply(
        200, data, {"ETag": f'"{digest(data)}"'}
    )
    extras = {"url": "/api/models/m/extras/?version=1", "sha256": digest(data), "bytes": len(data)}
    server.add_task(round=round, extras=extras if round else None)


def digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_extras_go_both_ways(server: FakeServer, tmp_path: Path) -> None:
    site = WithScaffold()
    offer(server, 0)
    offer(server, 1)

    fl_client.run(site, url=server.url, token="key", workdir=tmp_path)

    assert site.seen[0] == {}
    assert site.seen[1]["scaffold.c"]["w"].tolist() == [[0.5] * 3] * 2
    sent = load(server.updates[1].files["model_file"])
    assert sent["extra.scaffold.dc.w"].shape == (2, 3)
    assert sent["extra.prox.loss"].tolist() == 0.25
    assert server.updates[1].form["num_steps"] == ["1"]


def test_what_a_round_saved_that_did_not_count_is_dropped(
    server: FakeServer, tmp_path: Path
) -> None:
    offer(server, 0)

    def closed(_: Asked) -> Reply:
        server.tasks.pop(0)
        return refusal(409, "ROUND_CLOSED")

    server.routes["POST", "/api/models/m/"] = closed
    fl_client.run(WithScaffold(), url=server.url, token="key", workdir=tmp_path)

    assert not list(tmp_path.rglob("scaffold-*"))


class Coded(Client):
    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> FitResult:
        end = {name: value + 0.25 for name, value in weights.items()}
        coded = encodings.fp16(encodings.delta(weights, end))
        return FitResult(**coded.fields, num_examples=3)


def test_a_coded_update_says_what_it_is_and_leaves_out_what_stays_here(
    server: FakeServer, tmp_path: Path
) -> None:
    server.add_task(config={"exclude": ["b*"]})

    fl_client.run(Coded(), url=server.url, token="key", workdir=tmp_path)

    (tmp_path / "sent").write_bytes(server.updates[0].files["model_file"])
    with safe_open(tmp_path / "sent", "np") as file:
        assert file.metadata() == {"kind": "delta", "encoding": "fp16"}
        assert list(file.keys()) == ["w"]
        assert file.get_tensor("w").dtype == np.float16


def test_int8_is_the_published_affine_code() -> None:
    given = encodings.Encoded({"w": np.array([-1.1, 0.0, 0.61, 1.9])}, {})

    coded = encodings.int8(given).weights

    assert coded["w"].tolist() == [0, 94, 146, 255]
    assert float(coded["extra.enc.scale.w"]) == pytest.approx(0.011764705882352941)
    assert int(coded["extra.enc.zero.w"]) == 94


@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-3, 2.0, 6e4])
def test_int8_of_halves_is_as_near_as_of_any_other(size: float) -> None:
    value = (np.linspace(-1, 1, 41) * size).astype(np.float16)

    coded = encodings.int8(encodings.Encoded({"w": value}, {})).weights

    scale, zero = float(coded["extra.enc.scale.w"]), int(coded["extra.enc.zero.w"])
    decoded = (coded["w"].astype(np.float64) - zero) * scale
    assert scale == pytest.approx(np.ptp(value.astype(np.float64)) / 255, rel=1e-12)
    assert np.abs(decoded - value).max() <= scale * 1.0001


def test_what_a_half_loses_in_topk_and_int8_comes_with_the_next_round(tmp_path: Path) -> None:
    zero, change = np.zeros(3, np.float16), np.array([1.0, 1e-4, -3e-4], np.float16)
    rounds = [context(tmp_path, number) for number in range(30)]

    def sent(encode: Any) -> Any:
        return sum(decoded(encode(one)) for one in rounds)

    def decoded(coded: encodings.Encoded) -> Any:
        given = coded.weights
        if coded.metadata["encoding"] == "int8":
            zero, scale = given["extra.enc.zero.w"], given["extra.enc.scale.w"]
            return (given["w"].astype(float) - float(zero)) * float(scale)
        made = np.zeros(3)
        made[given["extra.enc.index.w"]] = given["w"]
        return made

    kept = sent(lambda one: encodings.topk({"w": zero}, {"w": change}, 2, one))
    coded = encodings.Encoded({"w": change}, {"kind": "delta"})
    told = sent(lambda one: encodings.feedback(coded, encodings.int8, one))

    np.testing.assert_allclose(kept, 30 * change.astype(float), atol=1e-3)
    np.testing.assert_allclose(told, 30 * change.astype(float), atol=1 / 255)


def numbers_of_all_sizes() -> np.ndarray:
    """Float64 next to, on and between halves of bfloat16; subnormal, too large, and none."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**16, 4000).astype(np.uint32) << 16
    bits = bits[np.isfinite(bits.view(np.float32))]
    exact = bits.view(np.float32).astype(np.float64)
    half = (bits | 0x8000).view(np.float32).astype(np.float64)
    near = np.nextafter(half, rng.choice([-np.inf, np.inf], half.shape))
    edges = np.array([0.0, -0.0, 3.4e38, -3.4e38, 1e300, np.inf, -np.inf, 1e-45, -1e-300])
    return np.concatenate([exact, half, near, rng.standard_normal(4000), edges])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_bfloat16_is_rounded_as_the_server_rounds(dtype: type) -> None:
    with np.errstate(over="ignore"):
        given = numbers_of_all_sizes().astype(dtype)

    made = BFloat16(given)

    assert made.bits.tobytes() == narrowed(given.astype(np.float64), "BF16")
    np.testing.assert_array_equal(np.asarray(made), widened(made.bits.tobytes(), "BF16"))
    assert np.isnan(np.asarray(BFloat16(np.array([np.nan, -np.nan])))).all()


BF16 = {"w": torch.tensor([1.0, -2.0, 0.5]).bfloat16(), "n": np.array(3)}
MOVED = {"w": torch.tensor([1.5, -2.0, 0.75]).bfloat16(), "n": np.array(5)}


def test_a_bfloat16_model_has_variates_gradients_and_moments(tmp_path: Path) -> None:
    scaffold = Scaffold(context(tmp_path), BF16)
    change = scaffold.finish(BF16, MOVED, lr_sum=0.5)["w"]
    again = Scaffold(context(tmp_path, 1), BF16).correction["w"]
    gradient = prox.proximal_gradient(MOVED, BF16, 2.0)

    assert (change.tolist(), change.dtype) == ([-1.0, 0.0, -0.5], np.float32)
    assert (again.tolist(), again.dtype) == ([1.0, 0.0, 0.5], np.float32)
    assert gradient.keys() == {"w"}
    assert (gradient["w"].tolist(), gradient["w"].dtype) == ([1.0, 0.0, 0.5], np.float32)


class InFloat32(Client):
    """Trains a bfloat16 model with NumPy."""

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> FitResult:
        return FitResult({"w": weights["w"].float().numpy() + np.float32(0.003)}, 1)


def test_what_was_handed_out_as_bfloat16_goes_back_as_such(
    server: FakeServer, tmp_path: Path
) -> None:
    server.models["m"] = torch_save({"w": BF16["w"]})
    server.add_task()

    fl_client.run(InFloat32(), url=server.url, token="key", workdir=tmp_path)

    sent = torch_load(server.updates[0].files["model_file"])["w"]
    assert torch.equal(sent, (BF16["w"].float() + 0.003).bfloat16())


class OfMlDtypes:
    """Stands in for an array of JAX: NumPy takes it, and says of its dtype that it is not floating."""

    def __init__(self, numbers: list[float], name: str = "bfloat16") -> None:
        self.dtype, self.shape = SimpleNamespace(name=name), (len(numbers),)
        self._numbers = np.array(numbers, object)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._numbers


def test_bfloat16_of_jax_is_a_float_in_every_encoding(tmp_path: Path) -> None:
    start, end = {"w": OfMlDtypes([1.0, -2.0, 0.5])}, {"w": OfMlDtypes([1.5, -2.0, 0.75])}

    change = encodings.delta(start, end).weights["w"]
    kept = encodings.topk(start, end, 1, context(tmp_path)).weights
    gradient = prox.proximal_gradient(end, start, 2.0)["w"]

    assert (np.asarray(change).tolist(), change.dtype) == ([0.5, 0.0, 0.25], "bfloat16")
    assert (np.asarray(kept["w"]).tolist(), kept["extra.enc.index.w"].tolist()) == ([0.5], [0])
    assert encodings.int8(encodings.Encoded(end, {})).weights["w"].dtype == np.uint8
    assert gradient.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("end", [OfMlDtypes([1.0], "float8_e5m2"), np.array([True])])
def test_what_the_server_does_not_add_is_the_new_value_in_a_delta(end: Any) -> None:
    assert encodings.delta({"w": end}, {"w": end}).weights["w"] is end


def test_qsgd_is_the_published_code() -> None:
    class Draws(np.random.Generator):
        def random(self, *_: Any, **__: Any) -> Any:
            return np.array([0.1, 0.9, 0.5, 0.3])

    coded = encodings.qsgd(encodings.Encoded({"w": V}, {}), 4, Draws(np.random.PCG64(0)))

    assert coded.weights["w"].tolist() == [2, -2, 0, 3]
    assert float(coded.weights["extra.enc.norm.w"]) == pytest.approx(1.5620499351813308)
    assert coded.metadata == {"encoding": "qsgd", "levels": "4"}


def test_qsgd_is_right_on_average() -> None:
    rng = np.random.default_rng(5)
    given = encodings.Encoded({"w": V}, {})

    draws = [encodings.qsgd(given, 4, rng).weights for _ in range(4000)]

    values = [draw["w"] * float(draw["extra.enc.norm.w"]) / 4 for draw in draws]
    np.testing.assert_allclose(np.mean(values, 0), V, atol=0.02)


def test_topk_with_error_feedback_is_the_published_code(tmp_path: Path) -> None:
    zero = {"w": np.zeros(4)}
    rounds = ([0.5, -2.0, 0.1, 1.0], [0.2, 0.1, 0.4, -0.3])

    coded = [
        encodings.topk(zero, {"w": np.array(change)}, 2, context(tmp_path, number)).weights
        for number, change in enumerate(rounds)
    ]

    assert coded[0]["extra.enc.index.w"].tolist() == [1, 3]
    assert coded[0]["w"].tolist() == [-2.0, 1.0]
    assert coded[1]["extra.enc.index.w"].tolist() == [0, 2]
    np.testing.assert_allclose(coded[1]["w"], [0.7, 0.5], atol=1e-12)


def test_running_variances_are_sent_as_they_are_in_every_round(tmp_path: Path) -> None:
    start = {"bn.running_var": np.ones(2, np.float32), "w": np.zeros(4, np.float32)}
    end = {"bn.running_var": np.array([0.4, 1e-6], np.float32), "w": V.astype(np.float32)}
    change = encodings.delta(start, end)
    rng = np.random.default_rng(1)

    for round in range(2):
        made = [
            encodings.topk(start, end, 1, context(tmp_path, round)),
            encodings.feedback(change, encodings.int8, context(tmp_path, round)),
            encodings.qsgd(change, 4, rng),
            encodings.fp16(change),
        ]

        for coded in made:
            sent = coded.weights["bn.running_var"]
            assert sent.tobytes() == change.weights["bn.running_var"].tobytes()
            assert not [name for name in coded.weights if name.endswith(".bn.running_var")]
            assert coded.weights["w"].dtype != np.float32 or len(coded.weights["w"]) == 1


def test_fednovas_norms_are_the_papers() -> None:
    steps = [1 - 0.9**k for k in range(5, 0, -1)]

    assert fednova.norm(5) == 5.0
    assert fednova.norm(5, momentum=0.9) == pytest.approx(sum(steps) / 0.1)
    assert fednova.norm(3, lr=0.1, mu=0.5) == pytest.approx(sum(0.95**k for k in range(3)))
    with pytest.raises(ValueError, match="together"):
        fednova.norm(3, momentum=0.9, mu=0.1)


def test_fedbn_keeps_what_the_vector_says() -> None:
    names = ["features.0.weight", "bn1.weight", "bn1.running_mean", "classifier.weight"]
    globals_, mine = {n: [10.0] for n in names}, {n: [1.0] for n in names}

    loaded = personal.keep_mine(globals_, mine, {"exclude": ["bn*"]})

    assert [loaded[name] for name in names] == [[10.0], [1.0], [1.0], [10.0]]
    assert [n for n in names if personal.together(n, {"exclude": ["bn*"]})] == [names[0], names[3]]
    assert [n for n in names if personal.together(n, {"include": ["classifier.*"]})] == names[3:]


def test_torch_gradients_are_corrected() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module(torch.ones(1, 1)).sum().backward()

    fl_client.torch_support.add_to_gradients(module, {"weight": np.array([[0.5]])})

    assert module.weight.grad.tolist() == [[1.5]]
