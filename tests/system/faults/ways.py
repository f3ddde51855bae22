"""Everything that goes on at once in a run, and the little that goes on in a short one."""

import threading
from pathlib import Path

from tests.system.faults.clients import Hook
from tests.system.faults.judging import Judged
from tests.system.faults.lanes import Lane, Trainings
from tests.system.faults.losses import Losing, Shared
from tests.system.faults.policies import Buffered, Joining, Scaffold, Skipping
from tests.system.faults.stacks import Stack
from tests.system.faults.steering import Doomed, Steered
from tests.system.faults.visitors import Questions, Reports, Uploads

SHORT = 1.5  # seconds that a round waits, where its deadline is to pass
LAG = 2.5  # longer than that, before anything is killed


def all_lanes(stack: Stack, stop: threading.Event, folder: Path, hook: Hook) -> list[Lane]:
    """Every kind of training that ends in the same bytes whatever happens, and all other requests."""
    where = (stop, folder)
    skipping = {"sampling": "poisson", "client_fraction": 0.5, "min_updates": 2}
    late = {"buffer_size": 2, "late_updates": "next_round", "staleness_weight": "constant"}
    buffered = {"buffer_size": 2, "staleness_weight": "constant"}
    return [
        Trainings(stack, "fedavg", *where, rounds=3, hook=hook, options={}),
        Trainings(
            stack, "swag", *where, rounds=2, uncertainty="SWAG", seconds=SHORT,
            options={"swag_rounds": 1},
        ),
        Trainings(
            stack, "feddc", *where, rounds=1, method="FedDC", seconds=SHORT, lag=LAG,
            failing=frozenset({1}), options={"daisy_chain_period": 3},
        ),
        Scaffold(stack, "scaffold", *where, rounds=3, method="SCAFFOLD", seconds=SHORT, options={}),
        Buffered(stack, "late", *where, rounds=3, seconds=SHORT, lag=LAG, options=late),
        Buffered(
            stack, "fedbuff", *where, rounds=3, method="FedBuff", seconds=SHORT, lag=LAG,
            options=buffered,
        ),
        Skipping(stack, "skipping", *where, rounds=3, seconds=SHORT, options=skipping),
        Joining(stack, "joining", *where, rounds=2, seconds=SHORT, options={"min_updates": 3}),
        Shared(stack, "shared", *where, rounds=2, options={}),
        Losing(stack, "losing", *where, rounds=2, options={"skip_model_tests": True}),
        Steered(stack, "steered", *where, rounds=2, options={}),
        Judged(stack, "judged", *where, rounds=2, options={}),
        Doomed(stack, "doomed", *where, rounds=1, method="FedAvgM", options={}),
        Uploads(stack, "uploads", stop),
        Questions(stack, "questions", stop),
        Reports(stack, "reports", stop),
    ]  # fmt: skip


def few_lanes(stack: Stack, stop: threading.Event, folder: Path, hook: Hook) -> list[Lane]:
    """One training whose deadlines pass, one with late updates, and questions."""
    late = {"buffer_size": 2, "late_updates": "next_round", "staleness_weight": "constant"}
    return [
        Trainings(stack, "fedavg", stop, folder, rounds=2, seconds=SHORT, hook=hook, options={}),
        Buffered(stack, "late", stop, folder, rounds=2, seconds=SHORT, lag=LAG, options=late),
        Questions(stack, "questions", stop),
    ]
