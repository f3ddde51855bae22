"""Fields and answers that many routes share."""

import math
from typing import Any

from rest_framework import serializers

from fl_server_core.exceptions import Invalid


class Text(serializers.CharField):
    """A string that every database can store."""

    def to_internal_value(self, data: Any) -> str:
        value = super().to_internal_value(data)
        if any("\ud800" <= char <= "\udfff" for char in value):
            self.fail("invalid")
        return value


class Finite(serializers.FloatField):
    """A number that JSON has a word for."""

    def to_internal_value(self, data: Any) -> float:
        value = super().to_internal_value(data)
        if not math.isfinite(value):
            self.fail("invalid")
        return value


class Input(serializers.Serializer[Any]):
    """A request body. A field that takes one value refuses two."""

    def to_internal_value(self, data: Any) -> Any:
        if hasattr(data, "getlist"):
            for name, field in self.fields.items():
                many = isinstance(field, serializers.ListField)
                if not many and len(data.getlist(name)) > 1:
                    raise Invalid(
                        f"{name} is given {len(data.getlist(name))} times",
                        errors=[{"pointer": f"/{name}", "code": "repeated", "detail": "once only"}],
                    )
        return super().to_internal_value(data)


class FieldError(serializers.Serializer[Any]):
    pointer = serializers.CharField()
    code = serializers.CharField()
    detail = serializers.CharField()


class ErrorOutput(serializers.Serializer[Any]):
    """Every refusal. More keys may follow: a `state`, a `round`, the `tensor` that is wrong."""

    detail = serializers.CharField()
    code = serializers.CharField()
    errors = FieldError(many=True, required=False)  # type: ignore[assignment]
    request_id = serializers.CharField()


class Detail(serializers.Serializer[Any]):
    detail = serializers.CharField()
