"""Answers that are remembered by the caller's `Idempotency-Key`."""

from django.conf import settings
from django.db import models


class IdempotencyKey(models.Model):
    """Written in the transaction of the request that it stands for: both exist, or neither."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True)
    scope = models.CharField(max_length=200)  # method and path, and the caller where there is one
    key = models.CharField(max_length=200)
    body_digest = models.CharField(max_length=64)
    status = models.PositiveSmallIntegerField()
    answer = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True, db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["scope", "key"], name="one_answer_per_key"),
        ]

    def __str__(self) -> str:
        return f"{self.scope} {self.key}"
