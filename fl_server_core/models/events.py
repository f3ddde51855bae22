"""Work that must happen: the durable row behind every Celery message."""

from django.db import models

from fl_server_core.lifecycle import EventState
from fl_server_core.models.rounds import Round
from fl_server_core.models.trainings import Training


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
