"""Tensors as NumPy's arrays: torch's too, and bfloat16, which NumPy has no dtype for. Torch is not needed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

LACKED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # of what safetensors files hold, by NumPy


class BFloat16:
    """Numbers as bfloat16: `bits`, uint16, as they lie in a file. `numpy.asarray` makes them float32."""

    dtype = "bfloat16"

    def __init__(self, numbers: Any) -> None:
        """Of floats of any dtype, each rounded once, to the nearest, halves to even; what is too large is infinite."""
        import numpy as np

        given = np.asarray(numbers)
        with np.errstate(over="ignore"):
            single = given.astype(np.float32)
        bits = single.view(np.uint32)
        if given.dtype.itemsize > 4:
            # Cut off, with the last bit saying whether anything was: rounded to float32 first, what lies next to a
            # half would become one.
            wide = single.astype(np.float64)
            cut = bits - (np.abs(wide) > np.abs(given)).astype(np.uint32)
            bits = np.where((wide == given) | np.isnan(given), bits, cut | 1)
        upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        self.bits: Array = np.where(np.isnan(single), 0x7FC0, upper).astype(np.uint16)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        import numpy as np

        single: Array = (self.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return single if dtype is None else single.astype(dtype, copy=False)


def is_torch(value: object) -> bool:
    """Whether this is a torch tensor, found out without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def dtype_name(value: Any) -> str:
    """float32, bfloat16, ...: whoever's dtype it is."""
    return getattr(value.dtype, "name", None) or str(value.dtype).removeprefix("torch.")


def array_of(value: Any) -> Array:
    """The same numbers as NumPy's; of dtypes that it lacks as float32. May share memory."""
    import numpy as np

    if is_torch(value):
        value = value.detach().cpu()
        value = (value.float() if dtype_name(value) in LACKED else value).numpy()
    made: Array = np.asarray(value)
    # JAX has these dtypes from `ml_dtypes`: not floating, says NumPy.
    return made.astype(np.float32, copy=False) if dtype_name(value) in LACKED else made


def floats_of(value: Any) -> Array | None:
    """The same numbers to calculate with, float64 or float32; None for what is not floating. May share memory."""
    import numpy as np

    array = array_of(value)
    if array.dtype.kind != "f":
        return None
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def like(numbers: Array, value: Any) -> Any:
    """`numbers` in the dtype of `value`, rounded once; TypeError for floats where that holds integers."""
    if dtype_name(value) == BFloat16.dtype:
        return BFloat16(numbers)
    return numbers.astype(array_of(value).dtype, copy=False, casting="same_kind")
