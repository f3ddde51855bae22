"""From float64 to a narrower dtype in one rounding, to the nearest, halves to even."""

import torch
from torch import Tensor

UNIT = 2.0**-53  # what a float64 is off by at most, relatively, when it is rounded


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in that dtype, or as they are where whoever copies them rounds once.

    torch goes through float32 to dtypes of 16 and 8 bits: a number just above the middle of two of
    theirs would become the middle, and then go to the even one. So the step to float32 is to odd.
    """
    if dtype.itemsize > 2 or values.dtype != torch.float64:
        return values
    single = values.to(torch.float32)
    wide, bits = single.to(torch.float64), single.view(torch.int32)
    bits -= (wide.abs() > values.abs()).int()  # back towards zero, infinity to the largest number
    bits |= wide != values
    return single.to(dtype)
