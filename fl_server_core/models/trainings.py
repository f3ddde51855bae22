"""A training, and who takes part in it."""

import uuid

from django.conf import settings
from django.db import models

from fl_server_core.lifecycle import TrainingState
from fl_server_core.models.weights import GlobalModel, ModelVersion


class UncertaintyMethod(models.TextChoices):
    """Names in the wire contract."""

    NONE = "NONE"
    ENSEMBLE = "ENSEMBLE"
    MC_DROPOUT = "MC_DROPOUT"
    SWAG = "SWAG"


class Training(models.Model):
    """What a researcher asked for, and how far it has come. Its row is the lock of everything below it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    model = models.OneToOneField(GlobalModel, on_delete=models.PROTECT, related_name="training")
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="trainings_as_actor"
    )
    participants = models.ManyToManyField(
        settings.AUTH_USER_MODEL, through="Participant", related_name="trainings"
    )
    state = models.CharField(
        max_length=1, choices=TrainingState, default=TrainingState.INITIAL, db_index=True
    )
    reason = models.TextField(blank=True)  # why it is in the state ERROR: "CODE: sentence"
    target_num_updates = models.PositiveIntegerField()
    metric_names = models.JSONField(default=list, blank=True)
    # Not choices: a new strategy needs no migration.
    aggregation_method = models.CharField(max_length=64, default="FedAvg")
    uncertainty_method = models.CharField(
        max_length=16, choices=UncertaintyMethod, default=UncertaintyMethod.NONE
    )
    options = models.JSONField(default=dict, blank=True)
    seed = models.BigIntegerField(default=0)
    base_version = models.ForeignKey(ModelVersion, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    last_update = models.DateTimeField(auto_now=True)
    # Who last paused, resumed, cancelled or retried it; null for an account that is gone.
    steered_at = models.DateTimeField(null=True, blank=True)
    steered_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(target_num_updates__gte=1), name="at_least_one_round"
            ),
            models.CheckConstraint(
                condition=models.Q(state__in=TrainingState.values), name="training_state_is_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.model.name} ({self.get_state_display()})"


class Participant(models.Model):
    """A user in a training. Rows stay when somebody is removed, for the history."""

    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="memberships"
    )
    joined_at = models.DateTimeField(auto_now_add=True)
    removed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["training", "user"], name="one_membership_per_user"),
        ]

    def __str__(self) -> str:
        return f"{self.user} in {self.training.model.name}"
