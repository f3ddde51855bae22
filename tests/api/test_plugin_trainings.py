"""The example of docs/how-to/add-an-aggregator.md, as a file and as a package, through the API."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
from safetensors.numpy import save

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core import plugins
from fl_server_core.models import TrainerEvent, Training
from tests.api.test_packed_bodies import body, send
from tests.api.test_strategy_vectors import Case, Site, plain, vec
from tests.scenes import scene, weights

pytestmark = pytest.mark.django_db
EXAMPLE = Path(__file__).parents[2] / "docs" / "how-to" / "examples" / "middle_half.py"
ROWS = [[1.0, -9.0], [2.0, 4.0], [4.0, 6.0], [1e9, 5.0]]
CASE = Case("MiddleHalf", vec(0.0, 0.0), [plain(ROWS, [2, 3, 4, 5])], [vec(3.0, 4.5)])


@pytest.fixture(params=["file", "package"])
def installed(request, tmp_path: Path, monkeypatch) -> Iterator[None]:
    """The example, as an administrator installs it."""
    copy(EXAMPLE, tmp_path)
    if request.param == "file":
        plugins.use_folder(tmp_path)
    else:
        info = tmp_path / "middle_half-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: middle-half\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[fl_server_ai.aggregation.strategies]\nMiddleHalf = middle_half\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(STRATEGIES, "_state", "new")
    assert "MiddleHalf" in STRATEGIES
    yield
    del STRATEGIES._items["MiddleHalf"]
    plugins.use_folder(None)
    for name in ("middle_half", "fl_plugins_middle_half"):
        sys.modules.pop(name, None)


def test_it_is_listed_created_by_name_and_aggregates(login, installed) -> None:
    site = Site(login, CASE)
    listed = {entry["name"]: entry for entry in site.actor.get("/api/aggregators/").json()}
    wrong = site.create({"trim": 0.5})
    site.start()

    process_trainer_task(site.answer_round(0).pk)  # the look at each update
    process_trainer_task(TrainerEvent.objects.get(state="pending").pk)

    assert listed["MiddleHalf"]["options_schema"]["properties"]["trim"]["exclusiveMaximum"] == 0.5
    assert listed["MiddleHalf"]["defaults"] == {"trim": 0.25, "buffer_policy": "mean"}
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (400, "/options/trim")
    np.testing.assert_array_equal(site.download()["w"], [3.0, 4.5])


def test_a_plugin_that_is_gone_stops_nobody_else(login, caplog) -> None:
    caplog.set_level(logging.CRITICAL, "django.request")
    gone = scene()
    other = training_create(
        actor=gone.actor,
        model=gone.model,
        target_num_updates=1,
        aggregation_method="FedAvg",
        options={},
        clients=[gone.sites["ada"].pk],
    )
    Training.objects.filter(pk=gone.training.pk).update(aggregation_method="MiddleHalf")
    site, actor = login(gone.sites["ada"]), login(gone.actor)
    waits = site.get("/api/tasks/").json()["state"]
    training_start(training=other, user=gone.actor)

    asked = site.get("/api/tasks/").json()["task"]["training"]
    sent = send(login, gone, body(save(weights(1.0))), coding="identity")

    assert (waits, asked) == ("wait", str(other.pk))
    assert (sent.status_code, sent.json()["code"]) == (503, "STRATEGY_MISSING")
    assert actor.get("/api/trainings/").status_code == 200
    assert sweep().failed == 0
    assert actor.post(f"/api/trainings/{gone.training.pk}/cancel/").status_code == 200
