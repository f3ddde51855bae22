"""Users and the tokens that they authenticate with."""

import uuid

from django.contrib.auth.models import AbstractUser
from django.db import models


class User(AbstractUser):
    """A person, a service or a site. `actor` may create trainings, `client` may take part in them."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    actor = models.BooleanField(default=False)
    client = models.BooleanField(default=False)
    message_endpoint = models.URLField(max_length=500, blank=True)
    # What `services.quotas` lets this user keep; empty: the setting FL_USER_BYTES. 0 is no limit.
    storage_bytes = models.PositiveBigIntegerField(null=True, blank=True)
    last_seen_at = models.DateTimeField(null=True, blank=True)


class ApiToken(models.Model):
    """A credential, stored only as a keyed digest. `prefix` is what people recognise it by."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_tokens")
    label = models.CharField(max_length=100, blank=True)
    prefix = models.CharField(max_length=8)
    digest = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.prefix}… ({self.label or 'no label'})"
