"""Numbers (or small binaries) that somebody measured on a model at a step."""

from django.conf import settings
from django.db import models
from django.db.models import Q

from fl_server_core.models.rounds import LocalModel
from fl_server_core.models.weights import GlobalModel


class Metric(models.Model):
    """One measurement of a global model or of one local model, unique per what it measures.

    `reporter` is null for what the server computed itself; `identifier` tells such values apart
    ("aggregated"). `sample_size` is the number of examples behind the value, where it is known.
    """

    AGGREGATED = "aggregated"

    model = models.ForeignKey(GlobalModel, on_delete=models.CASCADE, related_name="metrics")
    local_model = models.ForeignKey(
        LocalModel, on_delete=models.CASCADE, null=True, blank=True, related_name="metrics"
    )
    identifier = models.CharField(max_length=64, blank=True)
    key = models.CharField(max_length=128)
    value_float = models.FloatField(null=True, blank=True)
    value_binary = models.BinaryField(null=True, blank=True)
    step = models.PositiveIntegerField()
    sample_size = models.BigIntegerField(null=True, blank=True)
    reporter = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="metrics",
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["step", "key", "id"]
        constraints = [
            models.CheckConstraint(
                condition=Q(value_float__isnull=False, value_binary__isnull=True)
                | Q(value_float__isnull=True, value_binary__isnull=False),
                name="metric_has_one_value",
            ),
            # NULLs are distinct in a unique index, so each combination has its own.
            models.UniqueConstraint(
                fields=["model", "step", "reporter", "identifier", "key"],
                condition=Q(local_model__isnull=True, reporter__isnull=False),
                name="one_global_metric_per_reporter",
            ),
            models.UniqueConstraint(
                fields=["model", "step", "identifier", "key"],
                condition=Q(local_model__isnull=True, reporter__isnull=True),
                name="one_global_metric_of_the_server",
            ),
            models.UniqueConstraint(
                fields=["local_model", "identifier", "key"],
                condition=Q(local_model__isnull=False),
                name="one_metric_per_local_model",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.key} at {self.step}"
