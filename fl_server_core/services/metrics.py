"""Metrics: stored once per what they measure, aggregated per round."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from typing import Any

from django.db import transaction
from django.db.models import Count, QuerySet, Sum
from django.db.models.functions import Length

from fl_server_core.exceptions import Conflict, Invalid
from fl_server_core.lifecycle import TaskKind, TaskState
from fl_server_core.models import GlobalModel, LocalModel, Metric, Task, User

MAX_METRICS = 1_000  # in one request, and of one reporter at one step
MAX_BYTES = 4 * 2**20  # of one reporter's texts and other bytes at one step
MAX_KEY = 128
MAX_BINARY = 2**20
MAX_NUMBER = 64  # bytes of text that may be meant as a number
ROW_BYTES = 512  # what a number takes with its name and its places in three indexes, about
_GROUPS = r"[+-]?\d{1,3}([,' \u00a0\u202f]\d{3})+(\.\d+)?"
_COMMA = r"[+-]?(\d*|\d{1,3}([.' \u00a0\u202f]\d{3})+),\d+([eE][+-]?\d+)?"
_PLAIN = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
MISTYPED = (
    re.compile(_GROUPS, re.ASCII),
    re.compile(_COMMA, re.ASCII),
    re.compile(rf"({_GROUPS}|{_COMMA}|{_PLAIN})\s*%"),
)
Value = float | bytes


def metrics_parse(*, names: list[str], values: list[str | bytes]) -> dict[str, Value]:
    """Pair names with values: a number where it reads as one, else its bytes; `Invalid` otherwise.

    Text that is meant as a number ("0,85", "1,234.5", "85 %") is refused: as text it would be missing from
    the mean without a word.
    """
    if len(names) != len(values):
        raise Invalid(
            f"{len(names)} metric_names, but {len(values)} metric_values", code="METRIC_MISMATCH"
        )
    metric_names_check(names)
    metrics: dict[str, Value] = {}
    for name, raw in zip(names, values, strict=True):
        if name in metrics:
            raise Invalid(f"metric {name!r} is named twice", code="METRIC_MISMATCH")
        metrics[name] = _value(name, raw)
    return metrics


def metric_names_check(names: Iterable[str]) -> None:
    """Raise `Invalid` unless every name can be stored and there are not too many for one request."""
    names = list(names)
    if len(names) > MAX_METRICS:
        raise Invalid(
            f"{len(names):,} metrics; a request may have {MAX_METRICS:,}", code="TOO_MANY_METRICS"
        )
    for name in names:
        if not name or len(name) > MAX_KEY or any(_unstorable(char) for char in name):
            raise Invalid(
                f"a metric's name has 1 to {MAX_KEY} characters, no NUL and no half surrogates",
                code="METRIC_NAME",
            )


def _unstorable(char: str) -> bool:
    return char == "\x00" or "\ud800" <= char <= "\udfff"


def _value(name: str, raw: str | bytes) -> Value:
    data = raw.encode() if isinstance(raw, str) else raw
    if len(data) > MAX_BINARY:
        raise Invalid(f"metric {name!r} is larger than {MAX_BINARY} bytes", code="METRIC_SIZE")
    try:
        number = float(data)
    except ValueError:
        _check_not_mistyped(name, data)
        return data
    if not math.isfinite(number):
        raise Invalid(f"metric {name!r} is not finite", code="METRIC_NON_FINITE")
    return number


def _check_not_mistyped(name: str, data: bytes) -> None:
    text = data[:MAX_NUMBER].decode(errors="replace").strip()
    if len(data) <= MAX_NUMBER and any(form.fullmatch(text) for form in MISTYPED):
        raise Invalid(
            f"metric {name!r}: {text!r} is no number here; write it with a decimal point and without "
            "separators or %, like 1234.5 or 0.85",
            code="METRIC_NUMBER",
            errors=[
                {"pointer": "/metric_values", "code": "number", "detail": f"{text!r} is no number"}
            ],
        )


def metrics_record(
    *,
    model: GlobalModel,
    reporter: User,
    step: int,
    metrics: Mapping[str, Value],
    local_model: LocalModel | None = None,
    sample_size: int | None = None,
) -> None:
    """Store what `reporter` measured. Sent again, the newest value counts.

    `Conflict` (METRICS_FULL) if that makes more than `MAX_METRICS` names or `MAX_BYTES` for this step, or this update.
    """
    _store(
        model,
        {"local_model": local_model, "step": step, "reporter": reporter, "identifier": ""},
        {key: (value, sample_size) for key, value in metrics.items()},
        bounded=True,
    )


def metrics_size(metrics: Mapping[str, Value]) -> int:
    """Bytes of the database that these take, about."""
    return sum(ROW_BYTES + _bytes(value) for value in metrics.values())


def metrics_kept(owner: User) -> int:
    """Bytes, about, of what somebody has reported on models of his own without a training: nobody asked him for it."""
    rows = Metric.objects.filter(reporter=owner, model__owner=owner, model__training=None)
    found = rows.aggregate(number=Count("pk"), size=Sum(Length("value_binary")))
    return int(ROW_BYTES * found["number"] + (found["size"] or 0))


def _bytes(value: Value | memoryview | None) -> int:
    return len(value) if isinstance(value, bytes | memoryview) else 0


def _check_room(
    rows: QuerySet[Metric], known: Collection[Metric], values: Collection[Value]
) -> None:
    """Raise `Conflict` if `values` are too many in place of what is `known` of these rows."""
    found = rows.aggregate(number=Count("pk"), size=Sum(Length("value_binary")))
    number = found["number"] - len(known) + len(values)
    size = (found["size"] or 0) - sum(_bytes(row.value_binary) for row in known)
    size += sum(map(_bytes, values))
    _refuse_full(number, size)


def metrics_room_check(metrics: Mapping[str, Value]) -> None:
    """Raise `Conflict` (METRICS_FULL) if these alone are more than is kept at one step, whatever is there."""
    _refuse_full(len(metrics), sum(map(_bytes, metrics.values())))


def _refuse_full(number: int, size: int) -> None:
    if number > MAX_METRICS or size > MAX_BYTES:
        raise Conflict(
            f"your metrics of this step would be {number:,} with {size:,} bytes that are no numbers; "
            f"{MAX_METRICS:,} and {MAX_BYTES:,} are kept: send fewer names, or some of those that you have sent again",
            code="METRICS_FULL",
        )


def _store(
    model: GlobalModel,
    where: Mapping[str, Any],
    found: Mapping[str, tuple[Value, int | None]],
    *,
    bounded: bool = False,
) -> None:
    """Write values with their sample sizes by key, in a few queries however many there are."""
    if not found:
        return
    with transaction.atomic():
        # Not `update_conflicts`: neither database takes a partial unique index for that without its
        # condition, which Django does not send. The model's row puts writers in order instead.
        GlobalModel.objects.select_for_update(no_key=True).get(pk=model.pk)
        rows = Metric.objects.filter(model=model, **where)
        known = {row.key: row for row in rows.filter(key__in=list(found))}
        if bounded:
            _check_room(rows, known.values(), [value for value, _ in found.values()])
        fresh = {key: Metric(model=model, key=key, **where) for key in found.keys() - known.keys()}
        for key, (value, sample_size) in found.items():
            row = known.get(key) or fresh[key]
            row.value_float = None if isinstance(value, bytes) else value
            row.value_binary = value if isinstance(value, bytes) else None
            row.sample_size = sample_size
        Metric.objects.bulk_create([fresh[key] for key in found if key in fresh])
        Metric.objects.bulk_update(
            list(known.values()), ["value_float", "value_binary", "sample_size"]
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

    Each mean is over those who sent that metric as the answer to their task of this test: what the
    actor adds, or a site whose part had ended, is kept but not averaged. Who sent no sample size
    counts as one sample.
    """
    testers = Task.objects.filter(
        round__training__model=model, kind=TaskKind.EVALUATE, number=step, state=TaskState.DONE
    )
    rows = Metric.objects.filter(
        model=model,
        step=step,
        local_model=None,
        reporter__in=testers.values("user"),
        value_float__isnull=False,
        identifier="",
    ).order_by("reporter_id")
    seen: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in rows:
        seen[row.key].append((float(row.value_float or 0.0), row.sample_size or 1))
    totals = {key: sum(n for _, n in pairs) for key, pairs in seen.items()}
    means = {  # fractions: a sum of floats could overflow
        key: float(sum(Fraction(value) * n for value, n in pairs) / totals[key])
        for key, pairs in seen.items()
    }
    _store(
        model,
        {"local_model": None, "step": step, "reporter": None, "identifier": Metric.AGGREGATED},
        {key: (mean, totals[key]) for key, mean in means.items()},
    )
    return means
