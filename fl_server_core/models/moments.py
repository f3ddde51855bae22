"""SWAG: what participants tell of how their weights move, and what a round makes of it."""

import uuid

from django.conf import settings
from django.db import models

from fl_server_core.models.rounds import Round
from fl_server_core.models.trainings import Training
from fl_server_core.models.weights import Blob


class SwagMoments(models.Model):
    """First and second moments of the weights over local steps; without an owner: the round's, combined.

    Artifacts of a round like its updates, not metrics. All files are canonical safetensors.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="moments")
    round = models.ForeignKey(Round, on_delete=models.CASCADE, related_name="moments")
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="moments",
    )
    sample_size = models.BigIntegerField()
    first = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="first_moment_of"
    )
    second = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="second_moment_of"
    )
    # K columns w - mean of each tensor, stacked along a first dimension; only where they were asked for.
    deviations = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="deviations_of"
    )
    digest = models.CharField(max_length=194)  # of the files, with dots between
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
        verbose_name_plural = "SWAG moments"
        constraints = [
            models.UniqueConstraint(fields=["round", "owner"], name="one_moments_per_participant"),
            models.UniqueConstraint(
                fields=["round"],
                condition=models.Q(owner__isnull=True),
                name="one_combined_moments_per_round",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.round}: moments of {self.owner or 'all'}"
