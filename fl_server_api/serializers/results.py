"""What a training waits for, and what it has come to: rounds, metrics, versions."""

from typing import Any

from django.utils import timezone
from drf_spectacular.utils import extend_schema_field, inline_serializer
from rest_framework import serializers

from fl_server_ai.services.watching import Look
from fl_server_core.lifecycle import TaskKind, TaskState, TrainingState
from fl_server_core.models import LocalModel, Metric, ModelVersion, Round, Task
from fl_server_core.selectors import Part, failure_code, is_admin, part_of, told_at


class WhoOutput(serializers.Serializer[Any]):
    """Somebody who is waited for; `name`, `last_seen` and `progress` only where you may know them."""

    user = serializers.UUIDField()
    name = serializers.CharField(allow_blank=True)
    state = serializers.CharField(
        help_text="invited, offline, working or silent; unready for who has not joined with all that is "
        "required; actor for who may steer the training."
    )
    last_seen = serializers.DateTimeField(allow_null=True)
    progress = serializers.DictField(allow_null=True)


class BlockedOutput(serializers.Serializer[Any]):
    """What a training waits for, since when, until when, and what happens then."""

    code = serializers.CharField()
    since = serializers.DateTimeField(allow_null=True)
    until = serializers.DateTimeField(allow_null=True)
    then = serializers.CharField(allow_blank=True)
    who = WhoOutput(many=True)
    eta = serializers.DateTimeField(allow_null=True, help_text="A guess.")
    text = serializers.CharField()


class WatchOutput(serializers.Serializer[Look]):
    """A training as events tell it."""

    training = serializers.UUIDField(source="training.pk")
    state = serializers.ChoiceField(TrainingState.choices, source="training.state")
    reason = serializers.CharField(source="training.reason")
    round = serializers.IntegerField(source="training.model.round")
    target_num_updates = serializers.IntegerField(source="training.target_num_updates")
    current_version = serializers.IntegerField(source="training.model.weights.number")
    local_models_arrived = serializers.IntegerField(source="arrived")
    local_models_expected = serializers.IntegerField(source="expected")
    blocked_on = BlockedOutput(source="blocked", allow_null=True)


# Inline: a serializer can't declare a field named `data`.
EVENT_OUTPUT = inline_serializer(
    "EventOutput",
    {
        "event": serializers.ChoiceField(["training", "end"]),
        "id": serializers.CharField(required=False),
        "data": serializers.CharField(
            help_text="JSON: of `training` the fields of a WatchOutput, of `end` the last state."
        ),
    },
)


class ParticipationOutput(serializers.ModelSerializer[Task]):
    """One participant's part in a round.

    `progress`, `last_seen`, `sample_size` and of `failure` all but the code are for that participant, the
    actor and admins.
    """

    part = serializers.SerializerMethodField()
    code = serializers.SerializerMethodField()
    update_state = serializers.SerializerMethodField()
    sample_size = serializers.SerializerMethodField()
    last_seen = serializers.DateTimeField(source="user.last_seen_at", allow_null=True)

    class Meta:
        model = Task
        fields = [
            "user", "kind", "state", "part", "attempt", "code", "failure", "progress", "update_state",
            "sample_size", "last_seen", "created_at", "fetched_at", "progress_at", "finished_at",
        ]  # fmt: skip

    def get_part(self, task: Task) -> str:
        """invited, offline, working, silent; done; late, rejected, failed, removed or cancelled."""
        return part_of(task, timezone.now()).value

    def get_code(self, task: Task) -> str:
        """Why there is no answer, or not yet: of the last failed attempt."""
        return "" if task.state == TaskState.DONE else failure_code(task.failure)

    def get_update_state(self, task: Task) -> str | None:
        """Of the update that came of it: received, accepted, quarantined, consumed (it is in the aggregate) or refused."""
        update = self._update(task)
        return update.state if update else None

    def get_sample_size(self, task: Task) -> int | None:
        """Examples behind the update."""
        update = self._update(task)
        return update.sample_size if update else None

    def _update(self, task: Task) -> LocalModel | None:
        if task.kind != TaskKind.TRAIN:
            return None
        found = (one for one in task.round.local_models.all() if one.owner_id == task.user_id)
        return next(found, None)

    def to_representation(self, instance: Task) -> dict[str, Any]:
        """What a site says about its work may name its files or patients: other sites don't read it."""
        data = super().to_representation(instance)
        viewer = self.context["request"].user
        own = viewer.pk in {instance.user_id, instance.round.training.actor_id}
        if not own and not is_admin(viewer):
            data["failure"] = failure_code(instance.failure)
            data |= dict.fromkeys(("progress", "sample_size", "last_seen"))
        return data


class ExcludedOutput(serializers.Serializer[Any]):
    """Who was asked for an update that the round has gone on without, and why."""

    user = serializers.UUIDField()
    part = serializers.ChoiceField(Part.choices)
    code = serializers.CharField(allow_blank=True)


class RoundOutput(serializers.ModelSerializer[Round]):
    """`asked` for an update, of these `started` (has the task), `received`, and `excluded` with the reason."""

    participation = ParticipationOutput(source="tasks", many=True)
    base_version = serializers.IntegerField(source="base_version.number")
    result_version = serializers.SerializerMethodField()
    asked = serializers.SerializerMethodField()
    started = serializers.SerializerMethodField()
    received = serializers.SerializerMethodField()
    excluded = serializers.SerializerMethodField()
    seconds = serializers.SerializerMethodField()

    class Meta:
        model = Round
        fields = [
            "number", "phase", "asked", "started", "received", "excluded", "reason", "policy", "warnings",
            "base_version", "result_version", "started_at", "deadline", "finished_at", "seconds",
            "participation",
        ]  # fmt: skip

    def _asked(self, round: Round) -> list[Task]:
        return [task for task in round.tasks.all() if task.kind == TaskKind.TRAIN]

    def get_asked(self, round: Round) -> int:
        """How many were asked for an update."""
        return len(self._asked(round))

    def get_started(self, round: Round) -> int:
        """How many have got the task, or answered."""
        asked = self._asked(round)
        return sum(t.state == TaskState.DONE or told_at(t) is not None for t in asked)

    def get_received(self, round: Round) -> int:
        """How many updates are in; fewer than asked for, once the round has gone on: see `excluded`."""
        return sum(task.state == TaskState.DONE for task in self._asked(round))

    @extend_schema_field(ExcludedOutput(many=True))
    def get_excluded(self, round: Round) -> list[dict[str, Any]]:
        """Whose part has ended without an update, and why."""
        return [
            {
                "user": str(task.user_id),
                "part": part_of(task, timezone.now()).value,
                "code": failure_code(task.failure),
            }
            for task in self._asked(round)
            if task.state not in {TaskState.DONE, TaskState.OPEN}
        ]

    def get_seconds(self, round: Round) -> float | None:
        """From its opening to its end."""
        if round.finished_at is None:
            return None
        return (round.finished_at - round.started_at).total_seconds()

    def get_result_version(self, round: Round) -> int | None:
        return round.result_version.number if round.result_version else None


class TrainingMetricOutput(serializers.ModelSerializer[Metric]):
    """One number of one site, or with the kind aggregated the mean over those who tested."""

    kind = serializers.SerializerMethodField()
    site = serializers.SerializerMethodField()
    value = serializers.FloatField(source="value_float")

    class Meta:
        model = Metric
        fields = [
            "step", "key", "value", "kind", "site", "reporter", "sample_size", "created_at",
        ]  # fmt: skip

    @extend_schema_field(serializers.ChoiceField(["update", "test", "aggregated"]))
    def get_kind(self, metric: Metric) -> str:
        if metric.local_model_id is not None:
            return "update"
        return "test" if metric.reporter_id else metric.identifier

    def get_site(self, metric: Metric) -> str:
        """The reporter's name."""
        return metric.reporter.username if metric.reporter else ""


class VersionOutput(serializers.ModelSerializer[ModelVersion]):
    """One set of weights of a model; `strategy` is empty for what was uploaded."""

    based_on = serializers.IntegerField(source="parent.number", allow_null=True, default=None)
    sha256 = serializers.CharField(source="blob.digest")
    bytes = serializers.IntegerField(source="blob.size")
    url = serializers.SerializerMethodField()

    class Meta:
        model = ModelVersion
        fields = [
            "number", "based_on", "strategy", "num_updates", "total_examples", "sha256", "bytes", "url",
            "created_at",
        ]  # fmt: skip

    def get_url(self, version: ModelVersion) -> str:
        return f"/api/models/{version.model_id}/?version={version.number}"
