"""Smaller updates: deltas, half precision, int8, QSGD, top-k, with error feedback; as the server reads them.

Each function gives `Encoded`; return `FitResult(**encoded.fields, num_examples=...)` from `Client.fit`. Arrays are
NumPy's; what is not floating goes as it is (in a delta: as a difference, which the server adds). So do running
means and variances: with an error, or one from an earlier round added, a variance may be below 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_client.client import Context
from fl_client.memory import Memory
from fl_client.statistics import is_statistic

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Encoded:
    """Tensors by name, and what the file says of them."""

    weights: dict[str, Any]
    metadata: dict[str, str]

    @property
    def fields(self) -> dict[str, Any]:
        """For `FitResult(**encoded.fields, ...)`."""
        return {"weights": self.weights, "metadata": self.metadata}


def _lossy(name: str, value: "Array") -> bool:
    """Whether a tensor may be sent less than exactly."""
    return value.dtype.kind == "f" and not is_statistic(name)


def delta(start: "Arrays", end: "Arrays") -> Encoded:
    """end - start, in the arrays' own dtypes; integers wrap around, a bool is the new value."""
    changes = {
        name: value if value.dtype.kind == "b" else value - start[name]
        for name, value in end.items()
    }
    return Encoded(changes, {"kind": "delta"})


def fp16(encoded: Encoded) -> Encoded:
    """Half the bytes of float32; beyond 65,504 there is infinity, which the server refuses."""
    import numpy as np

    halves = {
        name: value.astype(np.float16) if _lossy(name, value) else value
        for name, value in encoded.weights.items()
    }
    return Encoded(halves, {**encoded.metadata, "encoding": "fp16"})


def int8(encoded: Encoded) -> Encoded:
    """Affine, per tensor: q = round(v / scale) + zero in 0..255, over a range that holds zero."""
    import numpy as np

    coded: dict[str, Any] = {}
    for name, value in encoded.weights.items():
        if not _lossy(name, value):
            coded[name] = value
            continue
        low, high = min(float(value.min(initial=0)), 0.0), max(float(value.max(initial=0)), 0.0)
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        coded[name] = np.clip(np.rint(value / scale) + zero, 0, 255).astype(np.uint8)
        coded[f"extra.enc.scale.{name}"] = np.array(scale)
        coded[f"extra.enc.zero.{name}"] = np.array(zero, np.uint8)
    return Encoded(coded, {**encoded.metadata, "encoding": "int8"})


def qsgd(encoded: Encoded, levels: int, rng: "np.random.Generator") -> Encoded:
    """Alistarh et al. 2017, arXiv:1610.02132: norm * sign * level / levels, unbiased; 1 to 32,767 levels."""
    import numpy as np

    kind = np.int8 if levels <= 127 else np.int16
    coded: dict[str, Any] = {}
    for name, value in encoded.weights.items():
        if not _lossy(name, value):
            coded[name] = value
            continue
        length = float(np.linalg.norm(value.astype(np.float64).ravel()))
        share = np.abs(value.astype(np.float64)) / (length or 1.0) * levels
        level = np.floor(share)
        level += rng.random(value.shape) < share - level
        coded[name] = (np.sign(value) * np.minimum(level, levels)).astype(kind)
        coded[f"extra.enc.norm.{name}"] = np.array(length)
    return Encoded(coded, {**encoded.metadata, "encoding": "qsgd", "levels": str(levels)})


def feedback(
    change: Encoded, encode: Callable[[Encoded], Encoded], context: Context, key: str = "feedback"
) -> Encoded:
    """`encode` a delta, with what earlier rounds' encoding lost added first; what is lost now goes to the next round.

    For `fp16`, `int8` and `qsgd`: `feedback(delta(start, end), int8, context)`. Stich et al. 2018, arXiv:1809.07599,
    and Karimireddy et al. 2019, arXiv:1901.09847. The rest is kept on disk as `topk` keeps it, under `key`.

    ValueError for QSGD with fewer levels than the square root of a tensor's size: its errors are larger than what it
    encodes, and would grow from round to round. It is right on average without this.
    """
    memory = Memory(context, key)
    rest = memory.load()
    whole = {
        name: value + rest[name] if name in rest and _lossy(name, value) else value
        for name, value in change.weights.items()
    }
    coded = encode(Encoded(whole, change.metadata))
    floats = [name for name, value in whole.items() if _lossy(name, value)]
    widest = max((whole[name].size for name in floats), default=0)
    if coded.metadata.get("encoding") == "qsgd" and int(coded.metadata["levels"]) ** 2 <= widest:
        raise ValueError(f"qsgd with feedback needs more than {int(widest**0.5)} levels here")
    memory.save({name: whole[name] - _decoded(coded, name, whole[name].dtype) for name in floats})
    return coded


def _decoded(coded: Encoded, name: str, dtype: "np.dtype[Any]") -> "Array":
    """What the server makes of a tensor."""
    import numpy as np

    value, encoding = coded.weights[name].astype(np.float64), coded.metadata.get("encoding")
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
    for name, change in delta(start, end).weights.items():
        if not _lossy(name, change):
            coded[name] = change
            continue
        flat = change.reshape(-1) + rest.get(name, np.zeros(change.size, change.dtype))
        # Stable: of equal ones the first.
        chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:k])
        coded[name] = flat[chosen]
        coded[f"extra.enc.index.{name}"] = chosen.astype(
            np.uint32 if flat.size <= 2**32 else np.int64
        )
        flat = flat.copy()
        flat[chosen] = 0
        left[name] = flat
    memory.save(left)
    return Encoded(coded, {"kind": "delta", "encoding": "topk"})
