"""Fields and answers that many routes share."""

import difflib
import math
from typing import Any, ClassVar

from rest_framework import serializers

from fl_server_core.exceptions import Invalid
from fl_server_core.services.rounds import SAMPLES_ARE

MAX_NAMES, MAX_NAME = 100, 64  # of unknown fields that are looked at


class Text(serializers.CharField):
    """A string that every database can store; a number is none."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        value = super().to_internal_value(data)
        if any("\ud800" <= char <= "\udfff" for char in value):
            self.fail("invalid")
        return value


class Finite(serializers.FloatField):
    """A number that JSON has a word for; true and false are none."""

    def to_internal_value(self, data: Any) -> float:
        if isinstance(data, bool):
            self.fail("invalid")
        value = super().to_internal_value(data)
        if not math.isfinite(value):
            self.fail("invalid")
        return value


class Examples(serializers.IntegerField):
    """A number of examples: one text for all bounds. Those of weights are wide, as the service refuses the rest."""

    default_error_messages: ClassVar[dict[str, Any]] = {
        "min_value": SAMPLES_ARE,
        "max_value": SAMPLES_ARE,
    }


class Input(serializers.Serializer[Any]):
    """A request body. A field that takes one value refuses two.

    Unknown fields are ignored: clients send some. With `guards_typos` one is refused that looks like a
    known field which is not given; ignoring `option` for `options` would do something else than asked.
    """

    guards_typos = False

    def to_internal_value(self, data: Any) -> Any:
        if self.guards_typos and hasattr(data, "keys"):
            self._refuse_typos(set(data))
        if hasattr(data, "getlist"):
            for name, field in self.fields.items():
                many = isinstance(field, serializers.ListField)
                if not many and len(data.getlist(name)) > 1:
                    raise Invalid(
                        f"{name} is given {len(data.getlist(name))} times",
                        errors=[{"pointer": f"/{name}", "code": "repeated", "detail": "once only"}],
                    )
        return super().to_internal_value(data)

    def _refuse_typos(self, given: set[Any]) -> None:
        missing = [str(name) for name in self.fields if name not in given]
        meant = {}
        for name in sorted(map(str, given - set(self.fields)))[:MAX_NAMES]:
            near = difflib.get_close_matches(name.lower()[:MAX_NAME], missing, n=1, cutoff=0.8)
            if near:
                meant[name] = near[0]
        if meant:
            raise Invalid(
                "; ".join(f"there is no field {n!r}; did you mean {m}?" for n, m in meant.items()),
                code="UNKNOWN_FIELD",
                errors=[
                    {"pointer": f"/{n}", "code": "unknown", "detail": f"did you mean {m}?"}
                    for n, m in meant.items()
                ],
            )


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
