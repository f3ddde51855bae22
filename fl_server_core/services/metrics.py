"""Metrics: stored once per what they measure, aggregated per round."""

import math
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction

from fl_server_core.exceptions import Invalid
from fl_server_core.models import GlobalModel, LocalModel, Metric, User

MAX_KEY = 128
MAX_BINARY = 2**20
Value = float | bytes


def metrics_parse(*, names: list[str], values: list[str | bytes]) -> dict[str, Value]:
    """Pair names with values: a number where it reads as one, else its bytes; `Invalid` otherwise."""
    if len(names) != len(values):
        raise Invalid(
            f"{len(names)} metric_names, but {len(values)} metric_values", code="METRIC_MISMATCH"
        )
    metrics: dict[str, Value] = {}
    for name, raw in zip(names, values, strict=True):
        if not name or len(name) > MAX_KEY or "\x00" in name:
            raise Invalid(f"a metric's name has 1 to {MAX_KEY} characters", code="METRIC_NAME")
        if name in metrics:
            raise Invalid(f"metric {name!r} is named twice", code="METRIC_MISMATCH")
        metrics[name] = _value(name, raw)
    return metrics


def _value(name: str, raw: str | bytes) -> Value:
    data = raw.encode() if isinstance(raw, str) else raw
    if len(data) > MAX_BINARY:
        raise Invalid(f"metric {name!r} is larger than {MAX_BINARY} bytes", code="METRIC_SIZE")
    try:
        number = float(data)
    except ValueError:
        return data
    if not math.isfinite(number):
        raise Invalid(f"metric {name!r} is not finite", code="METRIC_NON_FINITE")
    return number


def metrics_record(
    *,
    model: GlobalModel,
    reporter: User,
    step: int,
    metrics: Mapping[str, Value],
    local_model: LocalModel | None = None,
    sample_size: int | None = None,
) -> None:
    """Store what `reporter` measured. Sent again, the newest value counts."""
    for key, value in metrics.items():
        Metric.objects.update_or_create(
            model=model,
            local_model=local_model,
            step=step,
            reporter=reporter,
            identifier="",
            key=key,
            defaults={
                "value_float": None if isinstance(value, bytes) else value,
                "value_binary": value if isinstance(value, bytes) else None,
                "sample_size": sample_size,
            },
        )


def metrics_stored(
    *, model: GlobalModel, reporter: User, step: int, metrics: Mapping[str, Value]
) -> bool:
    """Whether exactly these values are what `reporter` has sent for `step`."""
    rows = Metric.objects.filter(
        model=model, local_model=None, reporter=reporter, step=step, identifier=""
    )
    found = {
        row.key: row.value_float if row.value_binary is None else bytes(row.value_binary)
        for row in rows
    }
    return found == dict(metrics)


def metrics_aggregate(*, model: GlobalModel, step: int) -> dict[str, float]:
    """Store the sample-weighted mean of every number that was measured at `step`; again gives the same.

    Each mean is over those who sent that metric. Who sent no sample size counts as one sample.
    """
    rows = Metric.objects.filter(
        model=model,
        step=step,
        local_model=None,
        reporter__isnull=False,
        value_float__isnull=False,
        identifier="",
    ).order_by("reporter_id")
    seen: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in rows:
        seen[row.key].append((float(row.value_float or 0.0), row.sample_size or 1))
    means = {}
    for key, pairs in seen.items():
        total = sum(n for _, n in pairs)
        means[key] = float(sum(Fraction(value) * n for value, n in pairs) / total)  # can't overflow
        Metric.objects.update_or_create(
            model=model,
            local_model=None,
            step=step,
            reporter=None,
            identifier=Metric.AGGREGATED,
            key=key,
            defaults={"value_float": means[key], "value_binary": None, "sample_size": total},
        )
    return means
