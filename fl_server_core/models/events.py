"""Work that must happen: the durable row behind every Celery message."""

from django.db import models
from django.db.models import F, Q

from fl_server_core.lifecycle import EventState
from fl_server_core.models.rounds import Round
from fl_server_core.models.trainings import Training
from fl_server_core.models.weights import Blob


class TrainerEvent(models.Model):
    """One piece of work. Each claim raises `attempt`, the fencing token that publishing checks."""

    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="events")
    round = models.ForeignKey(Round, on_delete=models.CASCADE, related_name="events")
    type = models.CharField(max_length=64)  # name of a class in fl_server_ai.trainer.events
    state = models.CharField(max_length=16, choices=EventState, default=EventState.PENDING)
    attempt = models.PositiveIntegerField(default=0)
    # Attempts that failed by the work itself or whose worker died; full disks and lost databases don't count.
    failures = models.PositiveIntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["training", "round", "type"], name="one_event_per_round_and_type"
            ),
        ]
        indexes = [
            models.Index(
                fields=["lease_until"],
                condition=models.Q(state__in=["pending", "running"]),
                name="unfinished_events",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.round}: {self.type}"


class SliceKind(models.TextChoices):
    """What a slice is of: the pass that compares updates, or the columns of the result."""

    SURVEY = "survey"
    COLUMNS = "columns"


class WorkSlice(models.Model):
    """A part of the event's work that any worker may do, as an event is: claimed, leased, fenced by `attempt`.

    `plan` says what is combined (SHA-256); slices of another plan are thrown away. The result's file is kept until
    the round is published or given up.
    """

    event = models.ForeignKey(TrainerEvent, on_delete=models.CASCADE, related_name="slices")
    kind = models.CharField(max_length=16, choices=SliceKind)
    index = models.PositiveIntegerField()
    of = models.PositiveIntegerField()  # slices of this kind
    plan = models.CharField(max_length=64)
    state = models.CharField(max_length=16, choices=EventState, default=EventState.PENDING)
    attempt = models.PositiveIntegerField(default=0)
    failures = models.PositiveIntegerField(default=0)  # as an event's
    lease_until = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True)
    result = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="slices_of"
    )
    recipe = models.CharField(max_length=64, blank=True)  # alike for all that belong together
    warnings = models.JSONField(default=list, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["event", "kind", "index"]
        constraints = [
            models.UniqueConstraint(
                fields=["event", "kind", "index"], name="one_slice_per_event_kind_and_index"
            ),
            models.CheckConstraint(condition=Q(index__lt=F("of")), name="a_slice_is_one_of_them"),
            models.CheckConstraint(
                condition=Q(state=EventState.DONE, result__isnull=False)
                | ~Q(state=EventState.DONE) & Q(result__isnull=True),
                name="a_slice_is_done_when_it_has_its_file",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.event}, {self.kind} {self.index + 1} of {self.of}"
