"""The steps of a pipeline in torch: what `fl_server_ai/preprocessing/steps.py` says, on (batch, channels, height, width)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fl_server_ai.preprocessing import steps
from fl_server_ai.preprocessing.pipeline import Pipeline
from fl_server_ai.sandbox.pipes import Refusal

BYTE = 255
UP = BYTE + 1 - 1e-3  # so that each of the 256 numbers has an equal share of 0 to 1


class StepFailed(Exception):
    """The step can't be done to these images; the text says what to do."""


def carried_out(pipeline: Pipeline, images: Tensor) -> Tensor:
    """All steps, one after the other. `images` has 3 or 4 dimensions; without a batch it gets one.

    The input stays as it was. `Refusal` (PREPROCESSING_FAILED) names the step that can't be done.
    """
    if images.dim() not in (3, 4):
        raise Refusal(
            "PREPROCESSING_FAILED",
            f"the model's preprocessing takes images, (channels, height, width) or a batch of them, not "
            f"a tensor of {images.dim()} dimensions",
        )
    images = images if images.dim() == 4 else images[None]
    for index, step in enumerate(pipeline):
        try:
            images = STEPS[type(step)](step, images)
        except StepFailed as error:
            name = steps.NAMES[type(step)]
            raise Refusal("PREPROCESSING_FAILED", f"steps[{index}], {name}: {error}") from error
    return images


def to_unit(images: Tensor) -> Tensor:
    """uint8 as float32 from 0 to 1; all else as it is."""
    return images.float() / BYTE if images.dtype == torch.uint8 else images


def _same(step: Any, images: Tensor) -> Tensor:
    return images


def _to_tensor(step: steps.ToTensor, images: Tensor) -> Tensor:
    return to_unit(images)


def _resize(step: steps.Resize, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    size = _resized(step, height, width)
    if max(size) > steps.LARGEST:
        raise StepFailed(f"{size[0]} x {size[1]} pixels; an edge may have {steps.LARGEST}")
    if size == (height, width):
        return images
    smooth = step.interpolation in steps.SMOOTH
    exact = images.dtype in (torch.float32, torch.float64)
    resized = interpolate(
        images if exact else images.float(),
        size=size,
        mode=step.interpolation,
        align_corners=False if smooth else None,
        antialias=step.antialias and smooth,
    )
    if images.dtype == torch.uint8:  # bicubic overshoots
        resized = resized.clamp_(0, BYTE)
    if not images.is_floating_point():
        resized = resized.round_()
    return resized.to(images.dtype)


def _resized(step: steps.Resize, height: int, width: int) -> tuple[int, int]:
    if isinstance(step.size, list) and len(step.size) == 2:
        return step.size[0], step.size[1]
    short = _first(step.size)
    long = int(short * max(height, width) / min(height, width))
    if step.max_size is not None and long > step.max_size:
        short, long = int(step.max_size * short / long), step.max_size
    short, long = max(short, 1), max(long, 1)
    return (short, long) if height <= width else (long, short)


def _center_crop(step: steps.CenterCrop, images: Tensor) -> Tensor:
    height, width = (
        step.size
        if isinstance(step.size, list) and len(step.size) == 2
        else (_first(step.size),) * 2
    )
    below = [max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)]
    if any(below):
        images = pad(images, [below[1] // 2, -(-below[1] // 2), below[0] // 2, -(-below[0] // 2)])
    top = round((images.shape[-2] - height) / 2)
    left = round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def _crop(step: steps.Crop, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if step.top + step.height > height or step.left + step.width > width:
        raise StepFailed(f"it reaches beyond an image of {height} x {width}; resize it before")
    return images[..., step.top : step.top + step.height, step.left : step.left + step.width]


def _grayscale(step: steps.Grayscale, images: Tensor) -> Tensor:
    channels = images.shape[-3]
    if channels not in (1, 3):
        raise StepFailed(f"the image has {channels} channels, neither 1 nor 3")
    if channels == 3:
        red, green, blue = images.unbind(-3)
        grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
        images = grey.to(images.dtype).unsqueeze(-3)
    return images.expand(-1, step.channels, -1, -1)


def _rgb(step: steps.Rgb, images: Tensor) -> Tensor:
    channels = images.shape[-3]
    if channels == 2:
        raise StepFailed("the image has 2 channels, neither 1 nor 3 or more")
    return images.expand(-1, 3, -1, -1) if channels == 1 else images


def _cast(step: steps.Cast, images: Tensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, step.dtype)
    if not step.scale or images.dtype == dtype:
        return images.to(dtype)
    if not images.is_floating_point() and images.dtype != torch.uint8:
        kind = str(images.dtype).removeprefix("torch.")
        raise StepFailed(f"scale is for uint8 and floats, the input is {kind}; leave scale out")
    if dtype == torch.uint8:
        return images.mul(UP).to(dtype)
    if images.dtype == torch.uint8:
        return images.to(dtype).mul_(1.0 / BYTE)
    return images.to(dtype)


def _normalize(step: steps.Normalize, images: Tensor) -> Tensor:
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise StepFailed(
            f'the input is {kind}: put {{"step": "cast", "dtype": "float32", "scale": true}} before'
        )
    channels = images.shape[-3]
    if len(step.mean) not in (1, channels):
        raise StepFailed(
            f"it is for {len(step.mean)} channels, the image has {channels}; put rgb or grayscale before"
        )
    mean, std = (
        torch.tensor(numbers, dtype=images.dtype)[:, None, None]
        for numbers in (step.mean, step.std)
    )
    if not std.all():
        raise StepFailed("a std is 0 in the input's dtype; cast to float32 before")
    return images.sub(mean).div_(std)


def _flatten(step: steps.Flatten, images: Tensor) -> Tensor:
    return images.flatten(1)


def _first(size: int | list[int]) -> int:
    return size[0] if isinstance(size, list) else size


STEPS: Mapping[type[Any], Callable[[Any, Tensor], Tensor]] = {
    steps.ToImage: _same, steps.ToTensor: _to_tensor, steps.Resize: _resize,
    steps.CenterCrop: _center_crop, steps.Crop: _crop, steps.Grayscale: _grayscale, steps.Rgb: _rgb,
    steps.Cast: _cast, steps.Normalize: _normalize, steps.Flatten: _flatten,
}  # fmt: skip
