"""Statistics of architectures: one row for each, and at most one job that counts."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.utils import timezone

from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import EventState
from fl_server_core.models import GlobalModel, InferenceJob, ModelStatistics
from fl_server_core.models.inference import JobKind

KEPT = timedelta(days=1)  # without a model that has them


@committing("statistics.store")
def statistics_store(*, model: GlobalModel, key: str, result: dict[str, Any]) -> ModelStatistics:
    """Keep the result and point the model at it. Twice does no harm: it is the same result."""
    row, _ = ModelStatistics.objects.update_or_create(key=key, defaults={"result": result})
    _point(model, row)
    return row


@committing("statistics.want")
def statistics_want(
    *, model: GlobalModel, key: str, create: Callable[[], InferenceJob]
) -> ModelStatistics:
    """The row of this architecture. If nothing counts, has counted or has failed to, `create` makes the job."""
    ModelStatistics.objects.get_or_create(key=key)
    row = ModelStatistics.objects.select_for_update().get(key=key)
    if row.result is None and row.job is None:
        row.job = create()
        row.save(update_fields=["job"])
    _point(model, row)
    return row


def statistics_of_job(job: InferenceJob) -> ModelStatistics | None:
    """The row that this job is to fill; None if it is gone or has another job by now."""
    return ModelStatistics.objects.filter(job=job).first()


def statistics_delete_unused() -> int:
    """Delete rows older than a day that no model points at."""
    old = ModelStatistics.objects.filter(
        of_models__isnull=True, created_at__lt=timezone.now() - KEPT
    ).exclude(job__kind=JobKind.STATISTICS, job__state__in=[EventState.PENDING, EventState.RUNNING])
    return old.delete()[0]


def _point(model: GlobalModel, row: ModelStatistics) -> None:
    if model.statistics_id != row.pk:
        GlobalModel.objects.filter(pk=model.pk).update(statistics=row)
        model.statistics = row
