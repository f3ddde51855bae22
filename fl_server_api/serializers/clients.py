"""What clients say when they join, and what they are told."""

from typing import Any

from rest_framework import serializers

from fl_server_api.serializers.common import Examples, Input, Text
from fl_server_api.serializers.models import MAX_INT
from fl_server_core.models import User
from fl_server_core.services.clients import Missing, Share
from fl_server_core.services.rounds import MAX_SAMPLES

MAX_ATTRIBUTES, MAX_VALUES = 100, 1_000


class Value(serializers.JSONField):
    """A string, number or truth value, or a list of these."""

    def to_internal_value(self, data: Any) -> Any:
        values = data if isinstance(data, list) else [data]
        if len(values) > MAX_VALUES or not all(_is_plain(value) for value in values):
            raise serializers.ValidationError(
                f"a string, a number, true or false, or a list of at most {MAX_VALUES} of them"
            )
        return data


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 256
    return isinstance(value, int | float) and abs(value) < 2**63


class JoinInput(Input):
    guards_typos = True

    capabilities = serializers.ListField(child=Text(max_length=64), default=list, max_length=100)
    attributes = serializers.DictField(child=Value(), default=dict)
    sdk_version = Text(max_length=64, default="", allow_blank=True)
    num_examples = Examples(default=None, allow_null=True, min_value=1, max_value=MAX_SAMPLES)

    def validate_attributes(self, value: dict[str, Any]) -> dict[str, Any]:
        """Few and short names."""
        if len(value) > MAX_ATTRIBUTES or any(len(name) > 128 for name in value):
            raise serializers.ValidationError(
                f"at most {MAX_ATTRIBUTES} attributes, with names of at most 128 characters"
            )
        return value


class LackOutput(serializers.Serializer[Missing]):
    """A requirement of a training that a participant does not meet."""

    training = serializers.UUIDField(source="training.pk")
    user = serializers.UUIDField(source="user.pk")
    name = serializers.CharField(source="lack.name")
    expected = serializers.JSONField(source="lack.expected")
    got = serializers.JSONField(source="lack.got", allow_null=True)
    text = serializers.CharField(source="lack.text")


class JoinOutput(serializers.Serializer[Any]):
    client = serializers.UUIDField()
    missing = LackOutput(many=True)
    min_protocol = serializers.IntegerField(max_value=MAX_INT)


class ShareOutput(serializers.Serializer[Share]):
    """How many examples a participant has said it has, and its part of the sum."""

    user = serializers.UUIDField(source="user.pk")
    num_examples = serializers.IntegerField(allow_null=True)
    share = serializers.FloatField(allow_null=True)


def own_only(rows: list[Any], viewer: User, *, all_of_them: bool) -> list[Any]:
    """What others say about themselves is for who started the training, and for admins."""
    return rows if all_of_them else [row for row in rows if row.user.pk == viewer.pk]
