"""Global and local models, updates and metrics. Bytes never appear in JSON."""

import base64
from typing import Any

from drf_spectacular.utils import PolymorphicProxySerializer, extend_schema_field
from rest_framework import serializers
from rest_framework.fields import empty

from fl_server_api.serializers.common import Examples, Finite, Input, Text
from fl_server_core.lifecycle import UpdateState
from fl_server_core.models import GlobalModel, LocalModel, Metric, ModelVersion
from fl_server_core.services.rounds import MAX_SAMPLES

MAX_INT = 2**31 - 1


class FreeDimension(serializers.IntegerField):
    """A size, or `None`/`null` for a dimension that is free."""

    def run_validation(self, data: Any = empty) -> int | None:
        if data is None or str(data).strip().lower() in {"none", "null", ""}:
            return None
        size: int = super().run_validation(data)
        return size


PREPROCESSING = (
    "A JSON pipeline, torchvision's v2 transforms (torch.save or pickle), or a TorchScript module, applied to what "
    "the model is asked with. Files of tensors are kept, but such a model can't be asked."
)


class ModelInput(Input):
    guards_typos = True

    name = Text(max_length=256)
    description = Text(allow_blank=True, max_length=10_000)
    type = serializers.ChoiceField(["GLOBAL", "SWAG", "MEAN"], default="GLOBAL")
    round = serializers.IntegerField(default=0, min_value=0, max_value=MAX_INT)
    input_shape = serializers.ListField(
        child=FreeDimension(min_value=1, max_value=MAX_INT, allow_null=True),
        required=False,
        max_length=16,
    )
    model_file = serializers.FileField(required=False, allow_empty_file=True)
    upload = serializers.CharField(
        required=False, help_text="Instead of model_file: the id of a finished upload of yours."
    )
    initial_weights = serializers.ChoiceField(
        ["client"],
        required=False,
        help_text="Instead of model_file: one of the training's clients is asked for the weights.",
    )
    model_preprocessing_file = serializers.FileField(
        required=False, allow_empty_file=True, help_text=PREPROCESSING
    )
    models = serializers.ListField(
        child=serializers.UUIDField(),
        required=False,
        max_length=1000,
        help_text="Of type MEAN: the members' ids.",
    )
    weights = serializers.ListField(
        child=Finite(),
        required=False,
        max_length=1000,
        help_text="Of type MEAN: how much each member counts; all alike if left out.",
    )


class ModelCreated(serializers.Serializer[Any]):
    detail = serializers.CharField()
    model_id = serializers.UUIDField()


class GlobalModelOutput(serializers.ModelSerializer[GlobalModel]):
    has_preprocessing = serializers.SerializerMethodField()
    input_shape = serializers.ListField(
        child=serializers.IntegerField(allow_null=True), allow_null=True
    )
    version = serializers.IntegerField(source="weights.number")
    sha256 = serializers.CharField(source="weights.blob.digest")
    size = serializers.IntegerField(source="weights.blob.size")

    class Meta:
        model = GlobalModel
        fields = [
            "id", "owner", "round", "name", "description", "type", "input_shape", "container",
            "has_preprocessing", "version", "sha256", "size", "created_at",
        ]  # fmt: skip

    def get_has_preprocessing(self, model: GlobalModel) -> bool:
        return model.preprocessing_id is not None


class LocalModelOutput(serializers.ModelSerializer[LocalModel]):
    round = serializers.IntegerField(source="round.number")
    base_model = serializers.UUIDField(source="training.model_id")
    sha256 = serializers.CharField(source="digest")

    class Meta:
        model = LocalModel
        fields = [
            "id", "owner", "round", "base_model", "sample_size", "state", "reason", "sha256",
            "size", "created_at",
        ]  # fmt: skip


ANY_MODEL = PolymorphicProxySerializer(
    component_name="AnyModel",
    serializers=[GlobalModelOutput, LocalModelOutput],
    resource_type_field_name=None,
    many=True,
)


class MetadataOutput(GlobalModelOutput):
    """`stats` is null unless `stats_state` is done; what can't be known of a layer is null in it."""

    stats = serializers.JSONField(allow_null=True)
    stats_state = serializers.ChoiceField(["done", "pending", "failed", "none"])
    stats_error = serializers.CharField(allow_null=True, help_text="Why it failed, or is none.")

    class Meta(GlobalModelOutput.Meta):
        fields = [*GlobalModelOutput.Meta.fields, "stats", "stats_state", "stats_error"]


class VersionOutput(serializers.ModelSerializer[ModelVersion]):
    sha256 = serializers.CharField(source="blob.digest")
    size = serializers.IntegerField(source="blob.size")

    class Meta:
        model = ModelVersion
        fields = [
            "id", "number", "parent", "sha256", "size", "strategy", "num_updates",
            "total_examples", "scalars", "created_at",
        ]  # fmt: skip


class MetricsInput(Input):
    metric_names = serializers.ListField(child=Text(allow_blank=True), required=False, default=list)
    metric_values = serializers.ListField(
        child=serializers.CharField(allow_blank=True, trim_whitespace=False),
        required=False,
        default=list,
    )
    sample_size = Examples(required=False, min_value=1, max_value=MAX_SAMPLES)
    round = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_INT,
        help_text="The step that was measured; refused if the model has moved on meanwhile.",
    )


DIGEST = serializers.RegexField(
    r"^[0-9a-fA-F]{64}\Z",
    required=False,
    help_text="SHA-256 of the file, hexadecimal: one that changed on the way is refused.",
    error_messages={"invalid": "64 hexadecimal digits"},
)


class UpdateInput(MetricsInput):
    guards_typos = True

    round = serializers.IntegerField(min_value=0, max_value=MAX_INT)
    sample_size = Examples(min_value=-(2**63), max_value=2**63)
    num_steps = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_INT,
        help_text="Optimiser steps that were made; some strategies need it.",
    )
    base_version = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_INT,
        help_text="The version that was trained on; refused if the round began with another.",
    )
    sha256 = DIGEST
    model_file = serializers.FileField(required=False, allow_empty_file=True)
    upload = serializers.CharField(
        required=False, help_text="Instead of model_file: the id of a finished upload of yours."
    )


class SwagInput(Input):
    round = serializers.IntegerField(min_value=0, max_value=MAX_INT)
    sample_size = Examples(min_value=-(2**63), max_value=2**63)
    first_moment_file = serializers.FileField(allow_empty_file=True)
    second_moment_file = serializers.FileField(allow_empty_file=True)
    deviations_file = serializers.FileField(
        required=False,
        allow_empty_file=True,
        help_text="Of each tensor w - mean at K steps, in the shape (K, ...); see options.swag_rank.",
    )


class UpdateCreated(serializers.Serializer[Any]):
    detail = serializers.CharField()
    update_id = serializers.UUIDField()
    round = serializers.IntegerField()
    received = serializers.IntegerField()
    needed = serializers.IntegerField()
    deadline = serializers.DateTimeField(allow_null=True)
    state = serializers.ChoiceField(
        UpdateState.values,
        required=False,
        help_text="received: a worker looks at it first; sent again: whatever has become of it since.",
    )
    reason = serializers.CharField(
        required=False,
        allow_blank=True,
        help_text="Why it is refused or in quarantine.",
    )


class PreprocessingInput(Input):
    model_preprocessing_file = serializers.FileField(allow_empty_file=True, help_text=PREPROCESSING)


class MetricOutput(serializers.ModelSerializer[Metric]):
    model = serializers.SerializerMethodField()
    identifier = serializers.SerializerMethodField()
    value_binary = serializers.SerializerMethodField()

    class Meta:
        model = Metric
        fields = [
            "id", "model", "identifier", "key", "value_float", "value_binary", "step", "reporter",
            "sample_size",
        ]  # fmt: skip

    @extend_schema_field(serializers.UUIDField())
    def get_model(self, metric: Metric) -> str:
        return str(metric.local_model_id or metric.model_id)

    def get_identifier(self, metric: Metric) -> str | None:
        return metric.identifier or None

    def get_value_binary(self, metric: Metric) -> str | None:
        """Base64."""
        value = metric.value_binary
        return None if value is None else base64.b64encode(bytes(value)).decode()
