"""Files that arrive in pieces (tus), until they are used."""

import uuid

from django.conf import settings
from django.db import models


class Upload(models.Model):
    """One file on its way. How much of it has arrived is the size of its staged file, not a column."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="uploads"
    )
    length = models.BigIntegerField()  # bytes, all of it
    sha256 = models.CharField(max_length=64, blank=True)  # as announced; else found when complete
    metadata = models.CharField(max_length=4000, blank=True)  # `Upload-Metadata`, as it was sent
    finished_at = models.DateTimeField(null=True, blank=True)  # complete, and the digest fits
    used_at = models.DateTimeField(
        null=True, blank=True
    )  # it has become something; the file is gone
    # The update that it became: sending the result again then gets the same receipt.
    update = models.ForeignKey(
        "LocalModel", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(db_index=True)

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(condition=models.Q(length__gte=1), name="upload_is_not_empty"),
        ]

    def __str__(self) -> str:
        return f"{self.length:,} bytes of {self.owner}"
