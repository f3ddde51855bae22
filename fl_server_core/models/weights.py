"""Stored weights, the global models that point at them, and each model's history of versions."""

import uuid

from django.conf import settings
from django.db import models


class Blob(models.Model):
    """One immutable file in the weights storage. The row outlives the file, never the other way round.

    A file belongs to one row; rows that are no longer referred to are doomed, their file is deleted, and
    the row goes last, so that a kill in between leaves nothing behind that the sweep would not find.
    """

    name = models.CharField(max_length=200, unique=True)
    digest = models.CharField(max_length=64, db_index=True)  # SHA-256 of the file, hexadecimal
    size = models.BigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)
    doomed_at = models.DateTimeField(null=True, blank=True, db_index=True)

    def __str__(self) -> str:
        return f"{self.digest[:12]} ({self.size:,} bytes)"


class ModelType(models.TextChoices):
    """Kinds of global model in the wire contract."""

    GLOBAL = "GLOBAL"
    SWAG = "SWAG"
    MEAN = "MEAN"


class GlobalModel(models.Model):
    """A model that can be trained. Its weights are its current version's; `round` counts aggregations."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="global_models"
    )
    name = models.CharField(max_length=256)
    description = models.TextField(blank=True)
    type = models.CharField(max_length=6, choices=ModelType, default=ModelType.GLOBAL)
    round = models.PositiveIntegerField(default=0)
    input_shape = models.JSONField(null=True, blank=True)  # list of sizes, null = free dimension
    container = models.CharField(
        max_length=20, default="safetensors"
    )  # the form it was uploaded in
    # The uploaded file itself, where weights can be given in its form only by overwriting a copy of it.
    template = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="template_of"
    )
    # Lists of names for one and the same numbers: updates must agree on them.
    ties = models.JSONField(default=list, blank=True)
    # Version 0 holds no tensors yet: the first participant who is asked for them sends them.
    awaits_weights = models.BooleanField(default=False)
    current_version = models.ForeignKey(
        "ModelVersion", on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    preprocessing = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="preprocessing_of"
    )
    statistics = models.ForeignKey(
        "ModelStatistics",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="of_models",
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return self.name

    @property
    def weights(self) -> "ModelVersion":
        """The current version. Null only inside the transaction that creates the model."""
        if self.current_version is None:
            raise ValueError(f"model {self.pk} has no weights yet")
        return self.current_version


class MeanMember(models.Model):
    """One model of an ensemble: by its current weights, or a local model with the file that it had.

    `mean` is a MEAN model, whose own file holds no tensors, or the model of a training with the method
    ENSEMBLE, whose members are the updates of its newest aggregation.
    """

    mean = models.ForeignKey(GlobalModel, on_delete=models.CASCADE, related_name="members")
    # Whose program runs.
    model = models.ForeignKey(GlobalModel, on_delete=models.PROTECT, related_name="ensembles")
    local_model = models.ForeignKey(
        "LocalModel", on_delete=models.PROTECT, null=True, blank=True, related_name="ensembles"
    )
    # A local model's weights: kept as long as the member, also when the update has given them up.
    blob = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="members_of"
    )
    position = models.PositiveIntegerField()
    weight = models.FloatField()  # any positive scale

    class Meta:
        ordering = ["mean", "position"]
        constraints = [
            models.UniqueConstraint(
                fields=["mean", "model"],
                condition=models.Q(local_model=None),
                name="one_membership_per_model",
            ),
            models.UniqueConstraint(
                fields=["mean", "local_model"], name="one_membership_per_local_model"
            ),
            models.CheckConstraint(
                condition=models.Q(local_model=None, blob=None)
                | models.Q(local_model__isnull=False, blob__isnull=False),
                name="a_local_member_has_its_file",
            ),
            models.CheckConstraint(condition=models.Q(weight__gt=0), name="weight_is_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.local_model_id or self.model_id} in {self.mean_id}"

    @property
    def weights(self) -> Blob:
        """The local model's file, else what the model has now."""
        return self.blob or self.model.weights.blob


class ModelVersion(models.Model):
    """An immutable set of weights: what was uploaded, or what a round came to."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    model = models.ForeignKey(GlobalModel, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField()
    parent = models.ForeignKey("self", on_delete=models.SET_NULL, null=True, blank=True)
    blob = models.ForeignKey(Blob, on_delete=models.PROTECT, related_name="versions")
    strategy_state = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="states"
    )
    # What clients get beside the weights (control variates), and the strategy's scalars after this version.
    shared = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="shared_by"
    )
    scalars = models.JSONField(default=dict, blank=True)
    # Empty: uploaded, not aggregated. A copy has that of its original, and its state until a training forgets it.
    strategy = models.CharField(max_length=64, blank=True)
    num_updates = models.PositiveIntegerField(default=0)
    total_examples = models.BigIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["model", "-number"]
        constraints = [
            models.UniqueConstraint(fields=["model", "number"], name="one_version_per_number"),
        ]

    def __str__(self) -> str:
        return f"{self.model.name}, version {self.number}"
