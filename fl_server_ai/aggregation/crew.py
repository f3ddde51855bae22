"""A crew of threads for one list of jobs."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

JobT = TypeVar("JobT")
Progress = Callable[[int, int], None]


def run_all(
    jobs: Sequence[JobT],
    threads: int,
    worker: Callable[[], Callable[[JobT], None]],
    progress: Progress | None,
) -> None:
    """Do every job once, on threads that each make their own `worker()`; raise the first failure."""
    waiting = iter(jobs)
    lock = threading.Lock()
    finished = threading.Semaphore(0)
    failures: list[BaseException] = []
    done = 0
    stopped = False

    def loop() -> None:
        nonlocal done
        try:
            with torch.no_grad():
                work = worker()
                while not stopped:
                    with lock:
                        job = next(waiting, None)
                    if job is None:
                        break
                    work(job)
                    with lock:
                        done += 1
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            failures.append(error)
        finally:
            finished.release()

    crew = [
        threading.Thread(target=loop, name=f"aggregate-{index}")
        for index in range(min(threads, len(jobs)))
    ]
    try:
        for thread in crew:
            thread.start()
        left = len(crew)
        while left and not failures:
            if finished.acquire(timeout=0.1):
                left -= 1
            if progress is not None:
                progress(done, len(jobs))
    finally:
        stopped = True
        for thread in crew:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
    if progress is not None and not jobs:
        progress(0, 0)
