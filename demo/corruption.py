"""Digits as a bad scanner gives them: noise, blur, rotation and shift, seeded, for the test set only."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from demo.data import Images, Labels, load

SEED = 7
NOISE = 0.3  # standard deviation, where black is 1
BLUR = 1.0  # standard deviation in pixels, of 8
ANGLE = 30.0  # degrees at most, either way
SHIFTS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)])  # pixels


def corrupted() -> tuple[Images, Labels]:
    """The test set five times, (5 n, 64) in 0..1: as it is, noisy, blurred, turned, moved."""
    _, _, flat, labels = load()
    images = flat.reshape(-1, 8, 8).astype(np.float64)
    rng = np.random.default_rng(SEED)
    noisy = images + rng.normal(0.0, NOISE, images.shape)
    blurred = ndimage.gaussian_filter(images, (0.0, BLUR, BLUR))
    angles = rng.uniform(-ANGLE, ANGLE, len(images))
    turned = [
        ndimage.rotate(image, angle, reshape=False, order=1)
        for image, angle in zip(images, angles, strict=True)
    ]
    moves = SHIFTS[rng.integers(len(SHIFTS), size=len(images))]
    moved = [ndimage.shift(image, move, order=0) for image, move in zip(images, moves, strict=True)]
    every: NDArray[np.float64] = np.concatenate([images, noisy, blurred, turned, moved])
    return every.clip(0.0, 1.0).reshape(-1, 64).astype(np.float32), np.tile(labels, 5)
