"""Users, groups and tokens."""

from typing import Any
from urllib.parse import urlsplit

from django.contrib.auth.models import Group
from rest_framework import serializers

from fl_server_api.serializers.common import Input, Text
from fl_server_core.exceptions import Invalid
from fl_server_core.models import ApiToken, User
from fl_server_core.selectors import is_admin

PRIVILEGED = frozenset(
    [
        "id",
        "is_staff",
        "is_superuser",
        "is_active",
        "groups",
        "user_permissions",
        "last_login",
        "date_joined",
    ]
)


ENDPOINT = "an address like https://site.example.org/hook, or nothing"


class RegistrationInput(Input):
    guards_typos = True

    username = serializers.RegexField(
        r"^[\w.@+-]+\Z",
        max_length=150,
        error_messages={"invalid": "letters, digits and the characters . @ + - _"},
    )
    password = Text(max_length=128, trim_whitespace=False, write_only=True)
    email = serializers.EmailField(required=False, allow_blank=True, max_length=254)
    first_name = Text(required=False, allow_blank=True, max_length=150)
    last_name = Text(required=False, allow_blank=True, max_length=150)
    actor = serializers.BooleanField(required=False, default=False)
    client = serializers.BooleanField(required=False, default=False)
    message_endpoint = serializers.RegexField(
        r"^(https?://[^\s\x00]+)?\Z",
        required=False,
        allow_blank=True,
        max_length=500,
        error_messages={"invalid": ENDPOINT},
    )

    def to_internal_value(self, data: Any) -> Any:
        sent = PRIVILEGED & set(data) if hasattr(data, "keys") else frozenset()
        if sent:
            raise Invalid(
                "these fields can't be set: " + ", ".join(sorted(sent)),
                code="PRIVILEGED_FIELD",
                errors=[
                    {"pointer": f"/{name}", "code": "privileged", "detail": "can't be set"}
                    for name in sorted(sent)
                ],
            )
        return super().to_internal_value(data)

    def validate_message_endpoint(self, value: str) -> str:
        """What looks like an address may still name no host, or a port that there is not."""
        try:
            parts = urlsplit(value)
            usable = not value or (bool(parts.hostname) and parts.port != 0)
        except ValueError:
            usable = False
        if not usable:
            raise serializers.ValidationError(ENDPOINT, code="invalid")
        return value


class UserOutput(serializers.ModelSerializer[User]):
    class Meta:
        model = User
        fields = [
            "id", "username", "first_name", "last_name", "email", "actor", "client",
            "message_endpoint",
        ]  # fmt: skip

    def to_representation(self, instance: User) -> dict[str, Any]:
        """How to reach somebody is for himself and for admins."""
        data = super().to_representation(instance)
        viewer = self.context["request"].user
        if not isinstance(viewer, User) or (viewer.pk != instance.pk and not is_admin(viewer)):
            data["email"] = data["message_endpoint"] = ""
        return data


class RegistrationOutput(UserOutput):
    """With what is shown once."""

    token = serializers.CharField()
    webhook_secret = serializers.CharField()

    class Meta(UserOutput.Meta):
        fields = [*UserOutput.Meta.fields, "token", "webhook_secret"]


class GroupOutput(serializers.ModelSerializer[Group]):
    class Meta:
        model = Group
        fields = ["id", "name"]


class GroupInput(Input):
    name = Text(max_length=150)


class TokenInput(Input):
    label = Text(  # type: ignore[assignment]
        required=False, allow_blank=True, max_length=100, default=""
    )
    days = serializers.IntegerField(required=False, min_value=1, max_value=3650)


class TokenOutput(serializers.ModelSerializer[ApiToken]):
    class Meta:
        model = ApiToken
        fields = [
            "id", "label", "prefix", "created_at", "expires_at", "last_used_at", "revoked_at",
        ]  # fmt: skip


class TokenSecret(serializers.Serializer[Any]):
    id = serializers.IntegerField()
    token = serializers.CharField()


class WebhookSecret(serializers.Serializer[Any]):
    webhook_secret = serializers.CharField()
