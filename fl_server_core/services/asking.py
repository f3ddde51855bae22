"""Opening a round, and drawing who is asked in it. Callers hold the training's row lock."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import StrEnum

from django.db.models import Count, Max
from django.utils import timezone

from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState, move
from fl_server_core.models import Round, Task, Training, User
from fl_server_core.models.notifications import NotificationType
from fl_server_core.services.clients import known_of
from fl_server_core.services.requirements import lacks
from fl_server_core.services.round_policy import RoundPolicy, policy_frozen, policy_of
from fl_server_core.services.rounds import Starts, deadline_in, tasks_ask
from fl_server_core.services.sampling import adaptive_seconds, sample_draw
from fl_server_core.services.trainings import participants_active

REMEMBERING = frozenset({"round_robin", "sticky"})  # draw by who was asked before
LOOK_BACK = 5  # rounds that an adaptive deadline is made of


class Asked(StrEnum):
    """What came of the attempt to ask somebody."""

    ASKED = "somebody was asked"
    WAITING = "too few may be asked now"
    EMPTY = "the draw was empty"


def round_open(*, training: Training, policy: RoundPolicy) -> tuple[Round, bool]:
    """The round that the model stands at, and whether it is new. Nobody is asked yet."""
    model = training.model
    return Round.objects.get_or_create(
        training=training,
        number=model.round,
        defaults={
            "base_version": model.weights,
            "deadline": deadline_in(policy.seconds),
            "policy": {
                **policy_frozen(policy),
                "population": len(participants_active(training)),
            },
        },
    )


def round_ask(
    *, round: Round, starts: Callable[[Sequence[User]], Starts] | None = None
) -> tuple[Asked, list[Task]]:
    """Draw the round's sample and ask it; from then on it is frozen, and asking again does nothing.

    Too few who may be asked now: nobody is, and it is for the caller to try again before the deadline.
    In a daisy chain `starts(users)` says which update each of them goes on from.
    """
    if round.tasks.filter(kind=TaskKind.TRAIN).exists():
        return Asked.ASKED, []
    policy, training = policy_of(round.policy), round.training
    members, there = eligible_now(round)
    overdue = round.deadline is not None and round.deadline <= timezone.now()
    if round.number == 0 and policy.require and len(there) < len(members) and not overdue:
        return Asked.WAITING, []  # before the first round there is time to hear from everybody
    drawn = set(
        sample_draw(
            policy.sampling,
            [str(user.pk) for user in there],
            seed=training.seed,
            number=round.number,
            count=policy.clients_per_round or 1,
            fraction=policy.client_fraction or 1.0,
            over=policy.over_selection,
            history=_history(training) if policy.sampling in REMEMBERING else None,
            always=policy.required,
        )
    )
    users = [user for user in there if str(user.pk) in drawn]
    if len(users) < policy.min_updates or _required_absent(policy, members, there):
        if policy.sampling == "poisson" and len(there) >= policy.min_updates:
            return Asked.EMPTY, []
        if len(there) < len(members) or not users:
            return Asked.WAITING, []
    _freeze(round, policy, len(there), len(members))
    begins = starts(users) if starts else None
    if begins is not None:
        round.chain = {str(pk): str(start.pk) if start else None for pk, start in begins.items()}
        round.save(update_fields=["chain"])
    tasks = tasks_ask(
        round, users, TaskKind.TRAIN, round.number, NotificationType.UPDATE_ROUND_START, begins
    )
    if round.phase == RoundPhase.NOTIFYING and not any(user.message_endpoint for user in users):
        move(round, RoundPhase.COLLECTING)
    return Asked.ASKED, tasks


def eligible_now(round: Round) -> tuple[list[User], list[User]]:
    """Who is in, and who of them may be asked now: seen lately, and with what the training requires."""
    policy = policy_of(round.policy)
    members = participants_active(round.training)
    known = known_of(members) if policy.require else {}
    there = [
        user
        for user in members
        if _seen(policy, user) and not lacks(policy.require, known.get(user.pk, {}))
    ]
    return members, there


def _seen(policy: RoundPolicy, user: User) -> bool:
    if policy.seen_within is None:
        return True
    oldest = timezone.now() - timedelta(seconds=policy.seen_within)
    return user.last_seen_at is not None and user.last_seen_at >= oldest


def _required_absent(policy: RoundPolicy, members: list[User], there: list[User]) -> bool:
    """Whether somebody who is required is in the training, but may not be asked now."""
    absent = {user.pk for user in members} - {user.pk for user in there}
    return any(str(pk) in policy.required for pk in absent)


def _history(training: Training) -> dict[str, tuple[int, int]]:
    """Of everybody who was asked before: the last round, and how often."""
    rows = Task.objects.filter(round__training=training, kind=TaskKind.TRAIN).order_by()
    told = rows.values_list("user").annotate(last=Max("number"), often=Count("pk"))
    return {str(pk): (last, often) for pk, last, often in told}


def _freeze(round: Round, policy: RoundPolicy, candidates: int, population: int) -> None:
    """What this round's sample and the past say about it: how many close it, and how long it may take.

    The sample may hold some who have joined since the round opened: they belong to its `population`.
    """
    seconds = policy.seconds
    if policy.deadline_factor is not None:
        durations = _durations(round)
        seconds = adaptive_seconds(durations, factor=policy.deadline_factor, ceiling=seconds)
    closes_at = policy.buffer_size
    if policy.over_selection > 1:
        closes_at = policy.goal(candidates)
    frozen = {"round_deadline": seconds, "buffer_size": closes_at, "population": population}
    round.policy = {**round.policy, **frozen}
    round.deadline = deadline_in(seconds)
    round.save(update_fields=["policy", "deadline"])


def _durations(round: Round) -> list[float]:
    """Seconds that parts of the last rounds took; who was late took at least as long as was waited."""
    parts = Task.objects.filter(
        round__training=round.training,
        kind=TaskKind.TRAIN,
        number__gte=round.number - LOOK_BACK,
        state__in=[TaskState.DONE, TaskState.EXPIRED],
        finished_at__isnull=False,
    )
    rows = parts.values_list("created_at", "not_before", "finished_at")
    return [
        (end - max(start, again or start)).total_seconds()
        for start, again, end in rows
        if end is not None
    ]
