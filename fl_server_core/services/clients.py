"""Joining in: what clients say about themselves, and who meets what a training requires."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import TERMINAL_TRAINING_STATES
from fl_server_core.models import ClientProfile, Training, User
from fl_server_core.services.requirements import Lack, lacks
from fl_server_core.services.trainings import participants_active


@dataclass(frozen=True)
class Missing:
    """What a participant lacks for a training."""

    training: Training
    user: User
    lack: Lack


@dataclass(frozen=True)
class Share:
    """A participant's part of all examples that participants have said they have; None if it said none."""

    user: User
    num_examples: int | None
    share: float | None


@committing("client.join")
def profile_set(
    *,
    user: User,
    capabilities: list[str],
    attributes: dict[str, Any],
    sdk_version: str,
    num_examples: int | None,
) -> ClientProfile:
    """Store what a client says about itself; it replaces what it said before."""
    profile, _ = ClientProfile.objects.update_or_create(
        user=user,
        defaults={
            "capabilities": capabilities,
            "attributes": attributes,
            "sdk_version": sdk_version,
            "num_examples": num_examples,
        },
    )
    return profile


def known_of(users: Iterable[User]) -> dict[Any, dict[str, Any]]:
    """By user id, what requirements may be about; empty for those who never joined."""
    profiles = {one.user_id: one for one in ClientProfile.objects.filter(user__in=list(users))}
    return {
        pk: {
            **profile.attributes,
            "num_examples": profile.num_examples,
            "capability": profile.capabilities,
        }
        for pk, profile in profiles.items()
    }


def training_missing(training: Training) -> list[Missing]:
    """What its participants lack, in the order of their ids."""
    require: Mapping[str, Any] = training.options.get("require") or {}
    if not require:
        return []
    users = participants_active(training)
    known = known_of(users)
    return [
        Missing(training, user, lack)
        for user in users
        for lack in lacks(require, known.get(user.pk, {}))
    ]


def client_missing(user: User) -> list[Missing]:
    """What this client lacks for the trainings that it takes part in and that have not ended."""
    trainings = Training.objects.filter(
        memberships__user=user, memberships__removed_at=None
    ).exclude(state__in=TERMINAL_TRAINING_STATES)
    known = known_of([user]).get(user.pk, {})
    return [
        Missing(training, user, lack)
        for training in trainings.order_by("created_at")
        for lack in lacks(training.options.get("require") or {}, known)
    ]


def training_shares(training: Training) -> list[Share]:
    """Whose examples make which part of the whole, as far as it was said."""
    users = participants_active(training)
    told = {pk: known["num_examples"] for pk, known in known_of(users).items()}
    total = sum(count for count in told.values() if count)
    return [
        Share(user, count, count / total if count is not None and total else None)
        for user in users
        for count in [told.get(user.pk)]
    ]
