"""Questions to models and their answers."""

import json
from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from fl_server_ai.services.calibration import MOST_BINS
from fl_server_ai.services.inference_inputs import DTYPES
from fl_server_api.parsers import strict_json
from fl_server_api.serializers.common import Input, Text
from fl_server_core.lifecycle import EventState

FORMATS = ("json", "binary", "npz")
NUMBERS = {"type": "array", "items": {}, "description": "nested lists of numbers, batch first"}


@extend_schema_field(
    {
        "oneOf": [
            NUMBERS,
            {"type": "string", "description": "base64 of an image or a file of one tensor"},
        ]
    }
)
class Numbers(serializers.Field[Any, Any, Any, Any]):
    """Nested lists, or base64 text; checked by the service."""

    def to_internal_value(self, data: Any) -> Any:
        if not isinstance(data, list | str):
            raise serializers.ValidationError("nested lists of numbers, or base64 text")
        return data

    def to_representation(self, value: Any) -> Any:
        return value


@extend_schema_field({"type": "object", "additionalProperties": {}})
class Options(serializers.DictField):
    """An object; in a form, its JSON text."""

    def get_value(self, dictionary: Any) -> Any:
        return dictionary.get(self.field_name, serializers.empty)

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, str):
            try:
                data = strict_json(data)
            except ValueError as error:
                raise serializers.ValidationError("must be a JSON object") from error
        return super().to_internal_value(data)


class InferenceInput(Input):
    """`options` are `{"uncertainty": {...}}`, as a training has them; see `GET uncertainty-methods/`."""

    guards_typos = True

    model_id = serializers.UUIDField(help_text="A global model, or a local one.")
    model_input = Numbers()
    dtype = serializers.ChoiceField(
        sorted(DTYPES), required=False, help_text="Of nested lists; float32 if left out."
    )
    return_format = serializers.ChoiceField(
        FORMATS, required=False, help_text="json if left out, in a form binary (safetensors)."
    )
    uncertainty_method = Text(
        required=False, max_length=64, help_text="The training's if left out; NONE without one."
    )
    options = Options(required=False, default=dict)
    calibration_input = Numbers(
        required=False,
        help_text="With SWAG: a batch of typical inputs, over which BatchNorm layers take their "
        "statistics anew for each draw.",
    )


class InferenceForm(InferenceInput):
    """The same with a file: a PNG or JPEG image, or one tensor in safetensors, .npz or torch.save."""

    model_input = serializers.FileField(allow_empty_file=True)  # type: ignore[assignment]
    calibration_input = serializers.FileField(  # type: ignore[assignment]
        required=False, allow_empty_file=True
    )


class CalibrationInput(Input):
    """A labelled batch; all else as for an inference."""

    guards_typos = True

    model_input = Numbers()
    labels = serializers.ListField(
        child=serializers.JSONField(help_text="A whole number."),
        help_text="The class of each sample, from 0.",
    )
    dtype = serializers.ChoiceField(
        sorted(DTYPES), required=False, help_text="Of nested lists; float32 if left out."
    )
    uncertainty_method = Text(
        required=False, max_length=64, help_text="The training's if left out; NONE without one."
    )
    options = Options(required=False, default=dict)
    bins = serializers.IntegerField(
        default=15, min_value=1, max_value=MOST_BINS, help_text="Of equal width, for the ECE."
    )
    calibration_input = Numbers(required=False, help_text="As for an inference.")


class CalibrationForm(CalibrationInput):
    """The same with files of one tensor each: safetensors, .npz or torch.save; or one image with one label."""

    model_input = serializers.FileField(allow_empty_file=True)  # type: ignore[assignment]
    labels = serializers.FileField(allow_empty_file=True)  # type: ignore[assignment]
    calibration_input = serializers.FileField(  # type: ignore[assignment]
        required=False, allow_empty_file=True
    )


class BinOutput(serializers.Serializer[Any]):
    """`confidence` and `accuracy` are means, null without samples."""

    low = serializers.FloatField()
    high = serializers.FloatField()
    count = serializers.IntegerField()
    confidence = serializers.FloatField(allow_null=True)
    accuracy = serializers.FloatField(allow_null=True)


class CalibrationOutput(serializers.Serializer[Any]):
    """How right the probabilities are (arXiv:1706.04599), and whether doubt finds the errors."""

    job_id = serializers.IntegerField()
    state = serializers.CharField(help_text="done")
    samples = serializers.IntegerField()
    accuracy = serializers.FloatField()
    ece = serializers.FloatField(help_text="Expected calibration error, over the bins.")
    nll = serializers.FloatField(help_text="Mean of -log p(label), in nats.")
    brier = serializers.FloatField(help_text="Mean squared error summed over classes, 0 to 2.")
    auroc = serializers.FloatField(
        allow_null=True, help_text="Of error detection; null without both errors and hits."
    )
    ranked_by = serializers.ChoiceField(["predictive_entropy", "confidence"])
    bins = BinOutput(many=True)
    notes = serializers.ListField(
        child=serializers.CharField(), help_text='What to know about it, as "CODE: text".'
    )


class InferenceOutput(serializers.Serializer[Any]):
    """`inference`: of NONE the index of the largest output per sample; else the mean over the draws."""

    job_id = serializers.IntegerField()
    state = serializers.ChoiceField([EventState.DONE.value])
    inference = serializers.JSONField(help_text="Nested lists, batch first.")
    uncertainty = serializers.DictField(
        child=serializers.JSONField(), help_text="Nested lists by name: variance, std, ..."
    )
    notes = serializers.ListField(
        child=serializers.CharField(),
        help_text='What to know about the answer, as "CODE: text"; a file has them in X-FL-Notes.',
    )


class InferencePending(serializers.Serializer[Any]):
    """Ask again at `url` after a moment."""

    job_id = serializers.IntegerField()
    state = serializers.ChoiceField([EventState.PENDING.value, EventState.RUNNING.value])
    url = serializers.CharField()


class MethodOutput(serializers.Serializer[Any]):
    name = serializers.CharField()
    paper = serializers.CharField(allow_blank=True)
    options_schema = serializers.DictField()
    defaults = serializers.DictField()


def encoded(body: dict[str, Any]) -> bytes:
    """As JSON; ValueError for NaN and infinity, which JSON has no words for."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
