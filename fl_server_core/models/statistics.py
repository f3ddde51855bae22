"""What an architecture is made of, counted once and kept for all models that have it."""

from django.db import models

from fl_server_core.models.inference import InferenceJob


class ModelStatistics(models.Model):
    """One architecture with one input shape. Without a result, `job` is who counts, or why nobody could."""

    key = models.CharField(max_length=64, unique=True)  # SHA-256 of what the result depends on
    result = models.JSONField(null=True, blank=True)
    job = models.ForeignKey(
        InferenceJob, on_delete=models.SET_NULL, null=True, blank=True, related_name="statistics"
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name_plural = "model statistics"
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"statistics {self.key[:12]}"
