"""Each malformed update is refused with its own code and a text that names what is wrong, and changes nothing."""

import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as configured
from django.db import connection
from django.test import override_settings

from fl_server_core.models import (
    Blob,
    GlobalModel,
    LocalModel,
    Metric,
    ModelVersion,
    Notification,
    Round,
    Task,
    TrainerEvent,
    Training,
)
from tests.api.malformed import FILES, GROUPS, Case, Send, Stage

pytestmark = pytest.mark.django_db
KEPT = (
    Blob, GlobalModel, LocalModel, Metric, ModelVersion, Notification, Round, Task, TrainerEvent, Training,
)  # fmt: skip
WAITING = Path(configured.FL_STAGING_DIR) / "uploads"


@pytest.fixture
def stage(settings: Any) -> Iterator[Stage]:
    """One for all cases of a group: that they change nothing is what each of them proves."""
    settings.FL_UPLOADS = 1_000
    yield Stage()
    shutil.rmtree(WAITING, ignore_errors=True)


@cache
def questions() -> list[tuple[str, Any]]:
    """Put together once: anew for each case it would cost a third of what the requests cost."""
    return [kind.objects.order_by("pk").values_list().query.sql_with_params() for kind in KEPT]


def rows() -> list[Any]:
    """All that there is of trainings, models and what belongs to them."""
    with connection.cursor() as cursor:
        return [cursor.execute(*one).fetchall() for one in questions()]


def files() -> set[Path]:
    """All in staging and storage, but for uploads that wait for being used."""
    found = {path for path in Path(configured.FL_DATA_DIR).rglob("*") if path.is_file()}
    return {p for p in found if "sqlite3" not in p.name and WAITING not in p.parents}


def check(stage: Stage, case: Case, sends: Sequence[Send], before: Any) -> None:
    for send in sends:
        with override_settings(**case.settings):
            answer = send(stage, case.to)

        said = answer.json()
        assert (answer.status_code, said["code"]) == (case.status, case.code), said
        assert said["detail"]
        assert said["request_id"]
        for words in case.say:
            assert words in answer.content.decode().replace("\\", ""), said
    assert (rows(), files()) == before


# A file comes in by each door in turn; by all of them nightly.
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_malformed_is_refused_by_name_and_changes_nothing(
    stage: Stage, subtests: pytest.Subtests, group: str, every: bool
) -> None:
    before, known = None, ""
    for turn, case in enumerate(GROUPS[group]):
        with subtests.test(case.name):
            stage.scene(case.to)
            if known != (known := case.to):
                before = rows(), files()
            one_door = group in FILES and not every
            check(stage, case, case.sends[turn % 3 :][:1] if one_door else case.sends, before)

    honest = {"round": 0, "sample_size": 2, "upload": stage.waiting}
    answer = stage.client().post(stage.path(), honest, format="multipart")
    assert (answer.status_code, answer.json()["received"]) == (201, 1)


def test_the_corpus_is_large_and_each_name_is_there_once() -> None:
    names = [case.name for group in GROUPS.values() for case in group]

    assert len(set(names)) == len(names) >= 200
