"""How far each update goes at most: the largest |update - base| over all float numbers, in one pass."""

import math
from collections.abc import Callable, Sequence

import torch

from fl_server_ai.aggregation.blocks import Run, Source
from fl_server_ai.aggregation.crew import run_all
from fl_server_ai.aggregation.fold import Folder


def largest(
    base: Source,
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
    block: int,
    share: int = 0,
    of: int = 1,
) -> list[float]:
    """One number an update; infinity where it holds anything that is not finite.

    `share` takes every `of`-th block: the largest of all shares is what one pass finds.
    """
    jobs = [
        (run, start, min(block, run.count - start))
        for run in floats
        for start in range(0, run.count, block)
    ][share::of]
    found: dict[int, list[float]] = {}

    def worker() -> Callable[[int], None]:
        longest = max((count for _, _, count in jobs), default=0)
        folder = Folder(device, longest, 8)

        def work(index: int) -> None:
            run, start, count = jobs[index]
            with folder.on_device():
                x = folder.rows([base], run, start, count)[0].to(torch.float64)
                found[index] = [
                    float((one.to(torch.float64) - x).abs().nan_to_num_(nan=math.inf).max())
                    for one in folder.blocks(sources, run, start, count)
                ]

        return work

    run_all(list(range(len(jobs))), threads, worker, None)
    return [max((values[k] for values in found.values()), default=0.0) for k in range(len(sources))]
