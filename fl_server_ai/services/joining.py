"""Clients that join in, and initial weights from one of them."""

from pathlib import Path
from typing import Any

from fl_server_ai.aggregation.dtypes import check_aggregated
from fl_server_ai.containers import check_finite, check_some
from fl_server_ai.services.intake import canonical_blob
from fl_server_ai.services.rounds import RUNNING, round_advance
from fl_server_core.exceptions import Invalid, NotPermitted
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import OPEN_PHASES, TaskKind
from fl_server_core.models import Round, Task, User
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.clients import Missing, client_missing, profile_set
from fl_server_core.services.initial_weights import initial_check, initial_set
from fl_server_core.services.trainings import training_locked


def client_join(*, user: User, **said: Any) -> list[Missing]:
    """Store what a client says about itself; returns what its trainings still miss from it.

    Trainings that wait for it go on at once. Joining again replaces what was said.
    """
    if not user.client:
        raise NotPermitted(
            "this account is not registered as a client; ask an admin for that role",
            code="NOT_A_CLIENT",
        )
    profile_set(user=user, **said)
    waiting = Round.objects.filter(
        phase__in=list(OPEN_PHASES),
        training__state__in=RUNNING,
        training__memberships__user=user,
        training__memberships__removed_at=None,
    ).exclude(tasks__kind=TaskKind.TRAIN)
    for training_id in waiting.values_list("training_id", flat=True):
        round_advance(training_id=training_id)
    return client_missing(user)


def initial_submit(
    *, task: Task, owner: User, file: Path, sha256: str | None
) -> tuple[Task, bool, str]:
    """Store initial weights as durably as an update; the same ones again are fine.

    Returns the task, whether they are new, and the SHA-256 (hex) that everybody is bound to.
    """
    if task.kind != TaskKind.INITIAL_WEIGHTS:
        raise Invalid("this task does not ask for initial weights", code="WRONG_KIND")
    with canonical_blob(file, sha256=sha256) as (manifest, blob, publish):
        check_some(manifest)
        check_aggregated(manifest)
        check_finite(publish.path, manifest)
        publish()
        try:
            with committing("initial.accept"):
                training_locked(task.round.training_id)
                fresh = Task.objects.select_related("round__training").get(pk=task.pk, user=owner)
                created = initial_check(task=fresh, digest=blob.digest)
                if created:
                    initial_set(task=fresh, owner=owner, blob=blob)
                    round_advance(training_id=task.round.training_id)
        finally:
            blob_discard(blob=blob)  # unless a row names it by now
    return fresh, created, blob.digest
