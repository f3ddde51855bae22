"""Federated daisy-chaining: when models are handed on, and when they are averaged.

Kamp, Fischer, Vreeken 2023, https://arxiv.org/abs/2110.03469, Algorithm 1: with one local round a step, every d-th
step hands models on, every b-th averages them, and averaging wins where both fall together.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fl_server_ai.services.training_options import TrainerOptions
from fl_server_core.models import Training, User
from fl_server_core.services.chains import chain_continue, chain_permute
from fl_server_core.services.rounds import Starts

AGGREGATE, CHAIN, CONTINUE = "aggregate", "chain", "continue"


def step_after(options: TrainerOptions, *, round: int, target: int) -> str:
    """What follows local round `round` (from 0) when its updates are in."""
    if not options.daisy_chain_period or round + 1 >= target:
        return AGGREGATE
    every = options.aggregation_every
    if every is not None and (round + 1) % every == 0:
        return AGGREGATE
    return CHAIN if (round + 1) % options.chain_period == 0 else CONTINUE


def starts_of(
    training: Training, options: TrainerOptions
) -> Callable[[Sequence[User]], Starts] | None:
    """Which update everybody goes on from in the round that is about to open; None: the global model."""
    number = training.model.round
    if number == 0:
        return None
    last = step_after(options, round=number - 1, target=training.target_num_updates)
    if last == CHAIN:
        return lambda users: chain_permute(
            training, number, users, no_fixed_points=options.no_fixed_points
        )
    if last == CONTINUE:
        return lambda users: chain_continue(training, users)
    return None


def weight_of(options: TrainerOptions, update: Any) -> int:
    """Samples that count for an update when chains are averaged."""
    return int(
        update.chain_samples if options.chain_weight == "chain_samples" else update.sample_size
    )
