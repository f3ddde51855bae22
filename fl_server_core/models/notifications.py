"""Webhook messages and how far their delivery has come."""

import uuid

from django.conf import settings
from django.db import models
from django.utils import timezone

from fl_server_core.lifecycle import NotificationState
from fl_server_core.models.rounds import Task
from fl_server_core.models.trainings import Training


class NotificationType(models.TextChoices):
    """Names in the wire contract; INITIAL_WEIGHTS is ours, and only where a client gives the weights."""

    TRAINING_START = "TRAINING_START"
    UPDATE_ROUND_START = "UPDATE_ROUND_START"
    SWAG_ROUND_START = "SWAG_ROUND_START"
    MODEL_TEST_ROUND = "MODEL_TEST_ROUND"
    TRAINING_FINISHED = "TRAINING_FINISHED"
    CLIENT_REMOVED = "CLIENT_REMOVED"
    INITIAL_WEIGHTS = "INITIAL_WEIGHTS"


class Notification(models.Model):
    """One message to one receiver, queued in the transaction that caused it.

    `id` orders the messages of one receiver; `delivery_id` is what receivers de-duplicate by.
    """

    delivery_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    training = models.ForeignKey(Training, on_delete=models.CASCADE, related_name="notifications")
    receiver = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="notifications"
    )
    task = models.ForeignKey(
        Task, on_delete=models.CASCADE, null=True, blank=True, related_name="notifications"
    )
    type = models.CharField(max_length=32, choices=NotificationType)
    step = models.IntegerField(default=-1)  # the round in the body; below 0: it names none
    asked = models.PositiveIntegerField(default=1)  # the task's attempt that it tells of
    body = models.JSONField(default=dict)
    state = models.CharField(
        max_length=16, choices=NotificationState, default=NotificationState.QUEUED
    )
    attempt = models.PositiveIntegerField(default=0)
    next_attempt_at = models.DateTimeField(default=timezone.now)
    last_status = models.PositiveIntegerField(null=True, blank=True)
    last_error = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.UniqueConstraint(
                fields=["training", "receiver", "type", "step", "asked"],
                name="one_notification_each",
            ),
        ]
        indexes = [
            models.Index(
                fields=["next_attempt_at"],
                condition=models.Q(state="queued"),
                name="queued_notifications",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.type} to {self.receiver}"
