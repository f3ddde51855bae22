"""The warm child for questions to models; like `child.py`, and with children of its own: the sandbox's."""

from collections.abc import Callable

from fl_server.embedded.child import run


def question_worker() -> Callable[[int], None]:
    """What to do with an id; loads torch, once."""
    from fl_server_ai.inference.working import job_work

    return job_work


if __name__ == "__main__":
    run(question_worker)
