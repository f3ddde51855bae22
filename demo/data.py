"""scikit-learn's handwritten digits, dealt so that each site knows a few of them well and the rest hardly."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DOMINANT = 3  # classes that make up most of a site's data
SHARE = 0.9  # how much of it
Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Site:
    """One site's own images (n, 64), and its part of the common test set."""

    x: Images
    y: Labels
    test_x: Images
    test_y: Labels
    dominant: tuple[int, ...]


def load() -> tuple[Images, Labels, Images, Labels]:
    """Training and test images as (n, 64) in 0..1, with labels; the split is fixed and stratified."""
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    y = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y
    )
    return train_x, train_y, test_x, test_y


def deal(sites: int) -> list[Site]:
    """Deal the training images. Site i mostly gets classes 2i, 2i+1 and 2i+2 (modulo 10)."""
    x, y, test_x, test_y = load()
    order = np.random.default_rng(0).permutation(len(y))
    wanted = [tuple((2 * site + k) % 10 for k in range(DOMINANT)) for site in range(sites)]
    own: list[list[int]] = [[] for _ in range(sites)]
    rest: list[int] = []
    for label in range(10):
        knowing = [site for site in range(sites) if label in wanted[site]]
        indices = [int(i) for i in order if y[i] == label]
        for n, index in enumerate(indices):
            if knowing:
                own[knowing[n % len(knowing)]].append(index)
            else:
                rest.append(index)
    # A tenth of what each site gets comes from everywhere: swap it between the sites.
    rng = np.random.default_rng(1)
    pool = rest
    for indices in own:
        rng.shuffle(indices)
        cut = int(len(indices) * (1 - SHARE))
        pool += indices[:cut]
        del indices[:cut]
    rng.shuffle(pool)
    parts = np.array_split(np.arange(len(test_y)), sites)
    return [
        Site(
            x[mine := np.array(indices + pool[site::sites])],
            y[mine],
            test_x[parts[site]],
            test_y[parts[site]],
            wanted[site],
        )
        for site, indices in enumerate(own)
    ]
