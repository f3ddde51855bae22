"""Each step equals its formula, Pillow's own resampling, or torch's, on images and batches."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fl_server_ai.preprocessing.pipeline import parse
from fl_server_ai.sandbox.image_steps import carried_out
from fl_server_ai.sandbox.pipes import Refusal


def done(images: Tensor, *steps: Any) -> Tensor:
    return carried_out(parse({"steps": list(steps)}), images)


def image(channels: int = 3, height: int = 20, width: int = 31, seed: int = 2) -> Tensor:
    bits = torch.randint(0, 256, (channels, height, width), generator=torch.manual_seed(seed))
    return bits.to(torch.uint8)


UNIT = {"step": "cast", "dtype": "float32", "scale": True}


def test_scaling_there_and_back_is_the_identity_on_bytes() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)

    there = done(every, UNIT)
    back = done(there, {"step": "cast", "dtype": "uint8", "scale": True})

    torch.testing.assert_close(there.double(), every.double() / 255, rtol=1e-6, atol=0)
    assert torch.equal(back, every)
    assert torch.equal(done(every, {"step": "to_tensor"}), every.float() / 255)
    assert torch.equal(done(every, {"step": "cast", "dtype": "int64"}), every.long())


def test_normalize_is_the_formula_for_each_channel() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 2.0, -1.0]
    given = torch.rand(2, 3, 4, 5, generator=torch.manual_seed(1))

    found = done(given, {"step": "normalize", "mean": mean, "std": std})

    for channel in range(3):
        expected = (given[:, channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_grayscale_is_the_formula_and_one_channel_stays() -> None:
    given = done(image(), UNIT)

    grey = done(given, {"step": "grayscale", "channels": 3})

    red, green, blue = given.double().unbind(1)
    expected = 0.2989 * red + 0.587 * green + 0.114 * blue
    for channel in range(3):
        torch.testing.assert_close(grey[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    whole = done(image(), {"step": "grayscale"})
    weights = np.array([0.2989, 0.587, 0.114], np.float32)
    assert whole.dtype == torch.uint8
    np.testing.assert_array_equal(
        whole[0, 0].numpy(), np.trunc(np.tensordot(weights, image().numpy().astype(np.float32), 1))
    )
    assert torch.equal(done(image(1), {"step": "grayscale"})[0], image(1))
    assert torch.equal(done(image(1), {"step": "rgb"})[0], image(1).repeat(3, 1, 1))
    assert torch.equal(done(image(4), {"step": "rgb"})[0], image(4))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [[7, 9], [40, 45], 11])
def test_resizing_bytes_is_pillows_resampling(interpolation: str, size: Any) -> None:
    given = image()
    modes = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

    found = done(given, {"step": "resize", "size": size, "interpolation": interpolation})

    height, width = size if isinstance(size, list) else (11, int(11 * 31 / 20))
    assert found.shape == (1, 3, height, width)
    for channel in range(
        3
    ):  # as floats: of bytes Pillow cuts off what bicubic overshoots between its two passes
        pillow = Image.fromarray(given[channel].numpy().astype(np.float32))
        resized = np.asarray(pillow.resize((width, height), modes[interpolation]))
        expected = resized.clip(0, 255).round()
        assert np.abs(found[0, channel].numpy() - expected).max() <= 1
        assert np.mean(found[0, channel].numpy() == expected) > 0.99


def test_resizing_floats_is_torchs_own() -> None:
    given = done(image(), UNIT)

    found = done(given, {"step": "resize", "size": [10, 16], "antialias": False})
    nearest = done(given, {"step": "resize", "size": [10, 62], "interpolation": "nearest"})

    expected = torch.nn.functional.interpolate(given, (10, 16), mode="bilinear")
    assert torch.equal(found, expected)
    rows = torch.arange(10) * 2
    assert torch.equal(nearest, given[..., rows, :].repeat_interleave(2, -1))


@pytest.mark.parametrize(
    ("height", "width", "size", "max_size", "expected"),
    [
        (20, 31, 10, None, (10, 15)),
        (31, 20, 10, None, (15, 10)),
        (20, 20, 10, None, (10, 10)),
        (10, 100, 20, 50, (5, 50)),
        (100, 10, [20], 50, (50, 5)),
        (20, 31, 20, None, (20, 31)),
    ],
)
def test_one_number_is_the_shorter_edge(
    height: int, width: int, size: Any, max_size: int | None, expected: tuple[int, int]
) -> None:
    step = {"step": "resize", "size": size, "max_size": max_size}

    assert done(image(1, height, width), step).shape[-2:] == expected


def test_crops_cut_where_they_say() -> None:
    given = image(height=20, width=31)

    centre = done(given, {"step": "center_crop", "size": [5, 8]})
    part = done(given, {"step": "crop", "top": 3, "left": 4, "height": 6, "width": 7})
    wider = done(given, {"step": "center_crop", "size": [25, 20]})

    assert torch.equal(centre[0], given[:, 8:13, 12:20])  # 7.5 and 11.5, rounded to even
    assert torch.equal(part[0], given[:, 3:9, 4:11])
    assert torch.equal(wider[0, :, 2:22], given[:, :, 6:26])
    assert not wider[0, :, :2].any()
    assert not wider[0, :, 22:].any()


def test_a_batch_is_done_image_by_image_and_the_input_stays() -> None:
    batch = torch.stack([image(seed=1), image(seed=2)])
    before = batch.clone()
    steps = [
        {"step": "resize", "size": 9}, {"step": "center_crop", "size": 8}, UNIT,
        {"step": "normalize", "mean": [0.5], "std": [0.2]}, {"step": "flatten"},
    ]  # fmt: skip

    together = done(batch, *steps)

    assert together.shape == (2, 192)
    assert torch.equal(together, torch.cat([done(one, *steps) for one in batch]))
    assert torch.equal(batch, before)


@pytest.mark.parametrize(
    ("given", "step", "told"),
    [
        (image(), {"step": "normalize", "mean": [0], "std": [1]}, "cast"),
        (image(1).float(), {"step": "normalize", "mean": [0] * 3, "std": [1] * 3}, "rgb"),
        (image(2), {"step": "grayscale"}, "2 channels"),
        (image(2), {"step": "rgb"}, "2 channels"),
        (image().long(), UNIT, "leave scale out"),
        (image(), {"step": "crop", "top": 18, "left": 0, "height": 4, "width": 1}, "beyond"),
        (image(1, 1, 40), {"step": "resize", "size": 10_000}, "edge"),
        (image().half(), {"step": "normalize", "mean": [0], "std": [1e-12]}, "float32"),
    ],
)
def test_what_cannot_be_done_names_the_step_and_what_to_do(
    given: Tensor, step: Any, told: str
) -> None:
    with pytest.raises(Refusal, match=rf"^steps\[1\], .*{told}") as caught:
        done(given, {"step": "to_image"}, step)

    assert caught.value.code == "PREPROCESSING_FAILED"


def test_a_pipeline_takes_images_only() -> None:
    with pytest.raises(Refusal, match="2 dimensions"):
        done(torch.zeros(3, 4), {"step": "flatten"})
