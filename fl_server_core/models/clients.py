"""What a client says about itself when it joins."""

from django.conf import settings
from django.db import models


class ClientProfile(models.Model):
    """A client's own word, replaced each time it joins; trainings may require some of it."""

    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="profile"
    )
    capabilities = models.JSONField(default=list, blank=True)  # kinds of tasks it knows
    attributes = models.JSONField(default=dict, blank=True)  # names, and values or lists of values
    num_examples = models.BigIntegerField(null=True, blank=True)
    sdk_version = models.CharField(max_length=64, blank=True)
    joined_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"what {self.user} says of itself"
