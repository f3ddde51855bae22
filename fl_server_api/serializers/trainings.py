"""Trainings, their rounds, and tasks."""

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from fl_server_ai.services.trainings import training_notices
from fl_server_api.serializers.clients import LackOutput, ShareOutput
from fl_server_api.serializers.common import Examples, Finite, Input, Text
from fl_server_api.serializers.models import DIGEST, MAX_INT
from fl_server_api.serializers.results import BlockedOutput
from fl_server_core.lifecycle import TaskState, TrainingState
from fl_server_core.models import Training
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.selectors import OUTCOMES, outcome


class TrainingInput(Input):
    guards_typos = True

    model_id = serializers.UUIDField()
    target_num_updates = serializers.IntegerField(min_value=1, max_value=MAX_INT)
    metric_names = serializers.ListField(child=Text(max_length=128), max_length=1000)
    aggregation_method = Text(max_length=64)
    uncertainty_method = serializers.ChoiceField(
        UncertaintyMethod.choices,
        default="NONE",
        error_messages={
            "invalid_choice": f"{{input!r}} is none of {', '.join(UncertaintyMethod.values)}."
        },
    )
    options = serializers.DictField(default=dict)
    clients = serializers.ListField(child=serializers.UUIDField(), default=list, max_length=100_000)


class TrainingCreated(serializers.Serializer[Any]):
    detail = serializers.CharField()
    training_id = serializers.UUIDField()
    model_id = serializers.UUIDField(
        help_text="The model that is trained: a copy, if the given one has a training or was trained."
    )


class TrainingOutput(serializers.ModelSerializer[Training]):
    participants = serializers.SerializerMethodField()
    round = serializers.IntegerField(source="model.round")
    current_version = serializers.IntegerField(source="model.weights.number")
    options = serializers.DictField()
    notices = serializers.SerializerMethodField()
    outcome = serializers.SerializerMethodField()

    class Meta:
        model = Training
        fields = [
            "id", "model", "actor", "participants", "state", "outcome", "reason", "round",
            "target_num_updates", "current_version", "metric_names", "uncertainty_method",
            "aggregation_method", "options", "created_at", "started_at", "finished_at",
            "last_update", "notices",
        ]  # fmt: skip

    @extend_schema_field(serializers.ChoiceField(OUTCOMES, allow_null=True))
    def get_outcome(self, training: Training) -> str | None:
        """How it ended; `completed_with_gaps`: some round went on without somebody, see `gaps`."""
        return outcome(training)

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_notices(self, training: Training) -> list[str]:
        """What people should know before it starts."""
        return training_notices(training)

    @extend_schema_field(serializers.ListField(child=serializers.UUIDField()))
    def get_participants(self, training: Training) -> list[str]:
        return [str(m.user_id) for m in training.memberships.all() if m.removed_at is None]


class MissingOutput(serializers.Serializer[Any]):
    """Who was asked for an update that is not in; `name` is empty where you may not know it."""

    user = serializers.UUIDField()
    name = serializers.CharField(allow_blank=True)
    state = serializers.ChoiceField(TaskState.choices)
    code = serializers.CharField(allow_blank=True)


class GapOutput(serializers.Serializer[Any]):
    """A round that got fewer updates than it asked for, in a sentence and in pieces."""

    round = serializers.IntegerField()
    received = serializers.IntegerField()
    asked = serializers.IntegerField()
    missing = MissingOutput(many=True)
    text = serializers.CharField()


class TrainingDetail(TrainingOutput):
    """With how many updates the current round has and waits for in all, and where some are missing."""

    local_models_arrived = serializers.IntegerField()
    local_models_expected = serializers.IntegerField()
    gaps = GapOutput(many=True)
    missing = LackOutput(many=True)
    shares = ShareOutput(many=True)
    blocked_on = BlockedOutput(allow_null=True)

    class Meta(TrainingOutput.Meta):
        fields = [
            *TrainingOutput.Meta.fields, "local_models_arrived", "local_models_expected", "gaps",
            "missing", "shares",
            "blocked_on",
        ]  # fmt: skip


class ControlOutput(serializers.Serializer[Any]):
    detail = serializers.CharField()
    state = serializers.ChoiceField(TrainingState.choices)


class ExtendInput(Input):
    """One of the two."""

    guards_typos = True

    deadline = serializers.DateTimeField(required=False)
    seconds = Finite(required=False, min_value=1.0, max_value=31_622_400.0)


class ExtendOutput(ControlOutput):
    deadline = serializers.DateTimeField(allow_null=True)
    remaining = serializers.FloatField(
        allow_null=True, help_text="While paused: the seconds that will be left after the resume."
    )


class ClientsInput(Input):
    clients = serializers.ListField(child=serializers.UUIDField(), max_length=100_000)


class TaskAnswer(serializers.Serializer[Any]):
    """One of three: a task, a reason to wait, or the end."""

    state = serializers.ChoiceField(["task", "wait", "done"])
    task = serializers.DictField(required=False)
    retry_after = serializers.FloatField(required=False)
    reason = serializers.CharField(required=False, allow_blank=True)
    code = serializers.CharField(
        required=False, help_text="Of a wait without an end: NOT_A_CLIENT, ask an admin."
    )
    own_update = serializers.DictField(
        required=False,
        help_text="Of a wait while the caller's update is refused or in quarantine: round, state, reason.",
    )
    final_model = serializers.DictField(required=False)
    training = serializers.UUIDField(required=False)
    training_state = serializers.CharField(required=False)


class ProgressInput(Input):
    step = serializers.IntegerField(required=False, allow_null=True, min_value=0, max_value=MAX_INT)
    of = serializers.IntegerField(required=False, allow_null=True, min_value=0, max_value=MAX_INT)
    metrics = serializers.DictField(child=Finite(), required=False)
    timings = serializers.DictField(child=Finite(), required=False)

    def validate(self, attrs: Any) -> Any:
        if any(len(attrs.get(name, {})) > 1000 for name in ("metrics", "timings")):
            raise serializers.ValidationError("at most 1000 values")
        return attrs


class ProgressOutput(serializers.Serializer[Any]):
    command = serializers.CharField(allow_null=True)
    deadline = serializers.DateTimeField(allow_null=True)


class FailureInput(Input):
    code = Text(max_length=64)
    text = Text(required=False, allow_blank=True, max_length=100_000, default="")
    log_tail = Text(required=False, allow_blank=True, max_length=1_000_000, default="")


class ResultMeta(Input):
    guards_typos = True

    num_examples = Examples(min_value=-(2**63), max_value=2**63)
    num_steps = serializers.IntegerField(required=False, min_value=0, max_value=MAX_INT)
    base_version = serializers.IntegerField(required=False, min_value=0, max_value=MAX_INT)
    sha256 = DIGEST
    metrics = serializers.DictField(child=Finite(), required=False)
    timings = serializers.DictField(child=Finite(), required=False)


class ResultInput(Input):
    guards_typos = True

    meta = serializers.CharField(max_length=1_000_000, help_text="A JSON object: ResultMeta.")
    model_file = serializers.FileField(required=False, allow_empty_file=True)
    upload = serializers.CharField(required=False)


class StrategyOutput(serializers.Serializer[Any]):
    name = serializers.CharField()
    paper = serializers.CharField(help_text="An arXiv id, or a URL.")
    takes = serializers.CharField(help_text="weights, gradient or mask")
    needs_num_steps = serializers.BooleanField()
    extras = serializers.ListField(
        child=serializers.DictField(),
        help_text="What clients send beside the weights, with the default options.",
    )
    options_schema = serializers.DictField()
    defaults = serializers.DictField()
