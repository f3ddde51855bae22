"""Smaller updates: deltas, half precision, int8, QSGD, top-k, with error feedback; as the server reads them.

Each function gives `Encoded`; return `FitResult(**encoded.fields, num_examples=...)` from `Client.fit`. Arrays are
NumPy's or torch's, bfloat16 too; what is not floating, and float8, goes as it is (an integer in a delta: as a
difference, which the server adds). So do running means and variances: with an error, or one from an earlier round
added, a variance may be below 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_client.arrays import LACKED, BFloat16, array_of, dtype_name, floats_of, like
from fl_client.client import Context
from fl_client.memory import Memory
from fl_client.statistics import is_statistic

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Tensors by name, and what the file says of them."""

    weights: dict[str, Any]
    metadata: dict[str, str]

    @property
    def fields(self) -> dict[str, Any]:
        """For `FitResult(**encoded.fields, ...)`."""
        return {"weights": self.weights, "metadata": self.metadata}


def _numbers(value: Any, name: str = "") -> "Array | None":
    """As float32 or float64, where the server decodes them; None for what goes as it is."""
    if dtype_name(value) in LACKED and dtype_name(value) != BFloat16.dtype:
        return None
    return None if is_statistic(name) else floats_of(value)


def _change(start: Any, end: Any) -> Any:
    """Floats as float32 or float64; a bool or float8 is the new value."""
    numbers = _numbers(end)
    if numbers is not None:
        return numbers - array_of(start)
    if dtype_name(end) in (*LACKED, "bool"):
        return end
    return array_of(end) - array_of(start)


def delta(start: "Arrays", end: "Arrays") -> Encoded:
    """end - start, in the dtypes of `start`; integers wrap around, a bool or float8 is the new value."""
    changes = {name: _change(start[name], value) for name, value in end.items()}
    own = {
        name: change if change is end[name] else like(change, start[name])
        for name, change in changes.items()
    }
    return Encoded(own, {"kind": "delta"})


def fp16(encoded: Encoded) -> Encoded:
    """Half the bytes of float32; beyond 65,504 there is infinity, which the server refuses."""
    import numpy as np

    halves = {
        name: value if (numbers := _numbers(value, name)) is None else numbers.astype(np.float16)
        for name, value in encoded.weights.items()
    }
    return Encoded(halves, {**encoded.metadata, "encoding": "fp16"})


def bf16(encoded: Encoded) -> Encoded:
    """Half the bytes of float32 and its whole range, with 8 significant bits; torch is not needed."""
    halves = {
        name: value if (numbers := _numbers(value, name)) is None else BFloat16(numbers)
        for name, value in encoded.weights.items()
    }
    return Encoded(halves, {**encoded.metadata, "encoding": "bf16"})


def int8(encoded: Encoded) -> Encoded:
    """Affine, per tensor: q = round(v / scale) + zero in 0..255, over a range that holds zero."""
    import numpy as np

    coded: dict[str, Any] = {}
    for name, value in encoded.weights.items():
        numbers = _numbers(value, name)
        if numbers is None:
            coded[name] = value
            continue
        wide = numbers.astype(np.float64)  # as the server decodes them, with this very scale
        low, high = float(wide.min(initial=0.0)), float(wide.max(initial=0.0))
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        coded[name] = np.clip(np.rint(wide / scale) + zero, 0, 255).astype(np.uint8)
        coded[f"extra.enc.scale.{name}"] = np.array(scale)
        coded[f"extra.enc.zero.{name}"] = np.array(zero, np.uint8)
    return Encoded(coded, {**encoded.metadata, "encoding": "int8"})


def qsgd(encoded: Encoded, levels: int, rng: "np.random.Generator") -> Encoded:
    """Alistarh et al. 2017, arXiv:1610.02132: norm * sign * level / levels, unbiased; 1 to 32,767 levels."""
    import numpy as np

    kind = np.int8 if levels <= 127 else np.int16
    coded: dict[str, Any] = {}
    for name, value in encoded.weights.items():
        numbers = _numbers(value, name)
        if numbers is None:
            coded[name] = value
            continue
        wide = numbers.astype(np.float64)
        length = float(np.linalg.norm(wide.ravel()))
        share = np.abs(wide) / (length or 1.0) * levels
        level = np.floor(share)
        level += rng.random(wide.shape) < share - level
        coded[name] = (np.sign(wide) * np.minimum(level, levels)).astype(kind)
        coded[f"extra.enc.norm.{name}"] = np.array(length)
    return Encoded(coded, {**encoded.metadata, "encoding": "qsgd", "levels": str(levels)})


def feedback(
    change: Encoded, encode: Callable[[Encoded], Encoded], context: Context, key: str = "feedback"
) -> Encoded:
    """`encode` a delta, with what earlier rounds' encoding lost added first; what is lost now goes to the next round.

    For `fp16`, `bf16`, `int8` and `qsgd`: `feedback(delta(start, end), int8, context)`. Stich et al. 2018, arXiv:1809.07599,
    and Karimireddy et al. 2019, arXiv:1901.09847. The rest is kept on disk as `topk` keeps it, under `key`.

    ValueError for QSGD with fewer levels than the square root of a tensor's size: its errors are larger than what it
    encodes, and would grow from round to round. It is right on average without this.
    """
    memory = Memory(context, key)
    rest, left = memory.load(), {}
    whole = dict(change.weights)
    for name, value in change.weights.items():
        if (numbers := _numbers(value, name)) is not None:
            whole[name] = left[name] = numbers + rest.get(name, 0)
    coded = encode(Encoded(whole, change.metadata))
    widest = max((numbers.size for numbers in left.values()), default=0)
    if coded.metadata.get("encoding") == "qsgd" and int(coded.metadata["levels"]) ** 2 <= widest:
        raise ValueError(f"qsgd with feedback needs more than {int(widest**0.5)} levels here")
    memory.save(
        {name: numbers - _decoded(coded, name, numbers.dtype) for name, numbers in left.items()}
    )
    return coded


def _decoded(coded: Encoded, name: str, dtype: "np.dtype[Any]") -> "Array":
    """What the server makes of a tensor."""
    import numpy as np

    encoding = coded.metadata.get("encoding")
    value = array_of(coded.weights[name]).astype(np.float64)
    if encoding == "int8":
        zero, scale = (coded.weights[f"extra.enc.{key}.{name}"] for key in ("zero", "scale"))
        value = (value - float(zero)) * float(scale)
    if encoding == "qsgd":
        value = value * float(coded.weights[f"extra.enc.norm.{name}"])
        value = value / int(coded.metadata["levels"])
    made: Array = value.astype(dtype)
    return made


def topk(start: "Arrays", end: "Arrays", k: int, context: Context) -> Encoded:
    """The k largest changes of each tensor; what is left out is added to the next round's changes.

    Aji, Heafield 2017, arXiv:1704.05021, with the error feedback of Stich et al. 2018, arXiv:1809.07599. The rest
    is kept on disk by training and round, so that it survives a restart and a round that is made twice.
    """
    import numpy as np

    memory = Memory(context, "topk")
    rest, left = memory.load(), {}
    coded: dict[str, Any] = {}
    for name, value in end.items():
        if _numbers(value, name) is None:
            coded |= delta({name: start[name]}, {name: value}).weights
            continue
        flat = _change(start[name], value).reshape(-1) + rest.get(name, 0)
        # Stable: of equal ones the first.
        chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:k])
        coded[name] = like(flat[chosen], start[name])
        coded[f"extra.enc.index.{name}"] = chosen.astype(
            np.uint32 if flat.size <= 2**32 else np.int64
        )
        flat[chosen] -= array_of(coded[name])  # of a half, what rounding lost stays
        left[name] = flat
    memory.save(left)
    return Encoded(coded, {"kind": "delta", "encoding": "topk"})
