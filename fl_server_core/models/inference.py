"""Questions to models: asked over HTTP, answered by a worker in its sandbox, kept for a day."""

from django.conf import settings
from django.db import models

from fl_server_core.lifecycle import EventState
from fl_server_core.models.rounds import LocalModel
from fl_server_core.models.weights import Blob, GlobalModel


class JobKind(models.TextChoices):
    """What a worker is asked for."""

    ANSWER = "answer"  # a prediction
    CALIBRATION = "calibration"  # predictions judged by labels
    STATISTICS = "statistics"  # what the model is made of; no inputs


class InferenceJob(models.Model):
    """One question to a model. Inputs and results are canonical safetensors: small ones in the row, others as files."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="inference_jobs"
    )
    # The global model whose program runs; `local_model`: with that update's weights.
    model = models.ForeignKey(GlobalModel, on_delete=models.CASCADE, related_name="inference_jobs")
    local_model = models.ForeignKey(
        LocalModel, on_delete=models.CASCADE, null=True, blank=True, related_name="inference_jobs"
    )
    # Does not keep the file: whose weights are deleted meanwhile gets an error.
    weights = models.ForeignKey(
        Blob, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    kind = models.CharField(max_length=16, choices=JobKind, default=JobKind.ANSWER)
    method = models.CharField(max_length=64)
    options = models.JSONField(default=dict)  # all of the method's, defaults filled in
    return_format = models.CharField(max_length=16)
    state = models.CharField(max_length=16, choices=EventState, default=EventState.PENDING)
    attempt = models.PositiveIntegerField(default=0)
    # Running: whose work it is until then. Pending: when the sweep hints at it again.
    lease_until = models.DateTimeField(null=True, blank=True)
    input_bytes = models.BinaryField(null=True)
    input_file = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="inputs_of"
    )
    result_bytes = models.BinaryField(null=True)
    result_file = models.ForeignKey(
        Blob, on_delete=models.PROTECT, null=True, blank=True, related_name="results_of"
    )
    notes = models.JSONField(default=list, blank=True)  # "CODE: what the asker should know"
    error = models.JSONField(null=True, blank=True)  # kind, code, detail and data of a refusal
    created_at = models.DateTimeField(auto_now_add=True, db_index=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at"]
        indexes = [
            models.Index(
                fields=["lease_until"],
                condition=models.Q(state__in=["pending", "running"]),
                name="unfinished_inference_jobs",
            ),
        ]

    def __str__(self) -> str:
        return f"inference {self.pk} ({self.state})"
