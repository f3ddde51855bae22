"""A round, who was asked in it (tasks), and what they sent (local models)."""

import uuid

from django.conf import settings
from django.db import models

from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState, UpdateState
from fl_server_core.models.trainings import Training
from fl_server_core.models.weights import Blob, ModelVersion


class Round(models.Model):
    """One step of a training. Its tasks are its frozen sample: joining later changes later rounds only."""

    STATE_FIELD = "phase"

    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="rounds")
    number = models.PositiveIntegerField()
    phase = models.CharField(max_length=16, choices=RoundPhase, default=RoundPhase.NOTIFYING)
    reason = models.TextField(blank=True)  # why it failed
    policy = models.JSONField(default=dict, blank=True)  # the options that were in force
    base_version = models.ForeignKey(ModelVersion, on_delete=models.PROTECT, related_name="+")
    result_version = models.OneToOneField(
        ModelVersion, on_delete=models.PROTECT, null=True, blank=True, related_name="produced_by"
    )
    warnings = models.JSONField(default=list, blank=True)
    # Daisy chains: who began with whose update, {participant: update or null for the global model}.
    chain = models.JSONField(null=True, blank=True)
    started_at = models.DateTimeField(auto_now_add=True)
    deadline = models.DateTimeField(null=True, blank=True, db_index=True)  # of the current phase
    extensions = models.PositiveIntegerField(default=0)  # of the deadline, for want of updates
    remaining = models.FloatField(null=True, blank=True)  # seconds left of it, while paused
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["training", "number"]
        constraints = [
            models.UniqueConstraint(fields=["training", "number"], name="one_round_per_number"),
            models.CheckConstraint(
                condition=models.Q(phase__in=RoundPhase.values), name="round_phase_is_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.training.model.name}, round {self.number}"


class Task(models.Model):
    """What one participant is asked to do in a round. `number` is the round as the client reports it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    round = models.ForeignKey(Round, on_delete=models.CASCADE, related_name="tasks")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="tasks"
    )
    kind = models.CharField(max_length=16, choices=TaskKind)
    number = models.PositiveIntegerField()
    state = models.CharField(max_length=16, choices=TaskState, default=TaskState.OPEN)
    # The update that this part goes on from, in a daisy chain; else the round's base version.
    continues = models.ForeignKey(
        "LocalModel", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    # Counts up when a failed or expired part is asked for again (failure policy "wait").
    attempt = models.PositiveIntegerField(default=1)
    not_before = models.DateTimeField(null=True, blank=True)  # of the latest attempt
    failure = models.TextField(
        blank=True
    )  # "CODE: text", as reported or found; of the last failed attempt
    progress = models.JSONField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    fetched_at = models.DateTimeField(null=True, blank=True)  # when the client was first told
    progress_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["created_at", "id"]
        constraints = [
            models.UniqueConstraint(
                fields=["round", "user", "kind"], name="one_task_per_participant_and_kind"
            ),
        ]
        indexes = [
            models.Index(
                fields=["user", "created_at"],
                condition=models.Q(state="open"),
                name="open_tasks_of_user",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.round}: {self.kind} by {self.user}"


class LocalModel(models.Model):
    """One participant's update. The row is kept for good (replays, participation), the file by policy."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="local_models")
    round = models.ForeignKey(Round, on_delete=models.CASCADE, related_name="local_models")
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="local_models"
    )
    sample_size = models.BigIntegerField()
    digest = models.CharField(max_length=64)  # SHA-256 of the canonical file
    size = models.BigIntegerField()
    blob = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="local_models"
    )
    # What came with it: SHA-256 over all of the following, empty if there is none.
    beside_digest = models.CharField(max_length=64, blank=True)
    num_steps = models.BigIntegerField(null=True, blank=True)
    base_version = models.PositiveIntegerField(null=True, blank=True)  # as the client said
    numbers = models.JSONField(default=dict, blank=True)  # extras that are numbers, by name
    extras = models.ForeignKey(  # extras that are tensors
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="extras_of"
    )
    tensors = models.JSONField(null=True, blank=True)  # names, where not all were sent
    mask = models.ForeignKey(  # which numbers were sent, where not all were
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="mask_of"
    )
    state = models.CharField(max_length=16, choices=UpdateState, default=UpdateState.RECEIVED)
    reason = models.TextField(blank=True)
    # Of a late update: the round that it answers; `round` is the one that it counts in.
    trained_in = models.ForeignKey(
        Round, on_delete=models.CASCADE, null=True, blank=True, related_name="late_models"
    )
    staleness = models.PositiveIntegerField(default=0)  # versions between those two
    # In a daisy chain: what it went on from, and all samples since the last aggregation.
    continues = models.ForeignKey(
        "self", on_delete=models.SET_NULL, null=True, blank=True, related_name="continued_by"
    )
    chain_samples = models.BigIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["training", "round", "owner"],
                condition=~models.Q(state="refused"),  # after which another one may come
                name="one_update_per_participant",
            ),
            models.CheckConstraint(
                condition=models.Q(sample_size__gte=1), name="at_least_one_sample"
            ),
        ]
        indexes = [
            models.Index(
                fields=["training", "created_at"],
                condition=models.Q(state="received"),
                name="updates_that_wait",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.round}: update of {self.owner}"
