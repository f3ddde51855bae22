"""`buffer_policy`: what becomes of a model's integer and bool tensors, from the request to the published model."""

from typing import Any

import numpy as np
import pytest

from fl_server_ai.aggregation.integers import combine
from fl_server_ai.trainer import slicing
from fl_server_ai.trainer.tasks import process_slice, process_trainer_task
from fl_server_core.models import TrainerEvent, WorkSlice
from fl_server_core.services.events import claimable
from tests.api.test_strategy_vectors import Case, Sent, Site

pytestmark = pytest.mark.django_db
START = {"seen": np.array([7, -3, 5], np.int64), "on": np.array([True, False, False])}
SENT = [  # with how many samples
    ({"seen": np.array([9, -5, 4], np.int64), "on": np.array([False, True, True])}, 1),
    ({"seen": np.array([2, -4, 9], np.int64), "on": np.array([False, True, False])}, 3),
]


def site_with(login: Any, **options: Any) -> Site:
    floats = {"w": np.array([0.5, 2.0])}
    sent = [Sent({**floats, **tensors}, samples) for tensors, samples in SENT]
    return Site(login, Case("FedAvg", {**floats, **START}, [sent], [None], options))


@pytest.mark.parametrize(
    ("policy", "shared"),
    [(None, False), ("max", False), ("keep", False), ("mean", True), ("max", True)],
)
def test_the_published_model_follows_it_however_many_make_it(
    policy: str | None, shared: bool, login: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_SHARED_ROUND_BYTES = int(shared)
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: 2)
    site = site_with(login, **({} if policy is None else {"buffer_policy": policy}))
    site.start()

    process_trainer_task(site.answer_round(0).pk)
    slices = WorkSlice.objects.count()
    for one in WorkSlice.objects.filter(claimable()):
        process_slice(one.pk)
    for event in TrainerEvent.objects.filter(claimable(), round__number=0):
        process_trainer_task(event.pk)

    assert (slices > 0) == shared
    got = site.download()
    for name, before in START.items():
        rows = np.stack([tensors[name] for tensors, _ in SENT])
        expected = combine(rows, [samples for _, samples in SENT], policy or "mean", before)
        np.testing.assert_array_equal(got[name], expected)


@pytest.mark.parametrize(("value", "code"), [("median", "choice"), (1, "type")])
def test_an_unknown_policy_is_refused_with_a_pointer(login: Any, value: object, code: str) -> None:
    answer = site_with(login).create({"buffer_policy": value})

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_OPTION")
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == ("/options/buffer_policy", code)


def test_the_api_and_the_admin_show_it(login: Any, admin_client: Any) -> None:
    site = site_with(login)
    listed = {entry["name"]: entry for entry in site.actor.get("/api/aggregators/").json()}
    training = site.create({}).json()["training_id"]

    page = admin_client.get(f"/admin/fl_server_core/training/{training}/change/").content.decode()

    described = listed["FedMedian"]["options_schema"]["properties"]["buffer_policy"]
    assert (described["enum"], described["default"]) == (["mean", "max", "keep"], "mean")
    assert "buffer_policy" in page
