"""`reset_state`: whether a training goes on with what its strategy remembers of the model."""

from dataclasses import replace

import numpy as np
import pytest

from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.models import ModelVersion, Training
from tests.api.test_strategy_vectors import Case, Sent, Site, plain, vec, with_extra

pytestmark = pytest.mark.django_db
ROUND = plain([[1.0, 1.0], [3.0, 1.0]])
MOMENTUM = Case("FedAvgM", vec(0.0, 0.0), [ROUND], [vec(2.0, 1.0)], {"momentum": 0.5})
CONTROL = Case(
    "SCAFFOLD",
    vec(0.0, 0.0),
    [[Sent(with_extra(vec(1.0, 1.0), scaffold__dc=[0.5, 0.25]))]],
    [vec(1.0, 1.0)],
)


def train(site: Site) -> ModelVersion:
    """One training of one round from the site's model on; its model is the site's from then on."""
    training = Training.objects.select_related("model").get(pk=site.start())
    site.model = str(training.model_id)
    process_trainer_task(site.answer_round(0).pk)
    return ModelVersion.objects.get(model_id=training.model_id, number=1)


def begun(site: Site) -> ModelVersion:
    return ModelVersion.objects.get(model_id=site.model, number=0)


def test_by_default_a_training_begins_anew(login) -> None:
    site = Site(login, MOMENTUM)
    train(site)  # from 0 to 2, 1: m = (-2, -1)

    train(site)  # the mean is the model itself: g = 0

    np.testing.assert_array_equal(site.download()["w"], [2.0, 1.0])
    assert begun(site).strategy_state is None


def test_never_goes_on_with_the_momentum_of_the_last_training(login) -> None:
    site = Site(login, MOMENTUM)
    train(site)
    site.options["reset_state"] = "never"

    train(site)  # m = 0.5 (-2, -1) + 0

    np.testing.assert_array_equal(site.download()["w"], [3.0, 1.5])
    assert begun(site).strategy == "FedAvgM"


def test_never_is_refused_where_sites_keep_a_part_of_the_state_themselves(login) -> None:
    site = Site(login, CONTROL)
    train(site)

    answers = [site.create({"reset_state": "never"})]
    for method in ("FedDyn", "IIADMM"):
        site.case = replace(CONTROL, method=method)
        answers.append(site.create({"reset_state": "never"}))

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (400, "BAD_OPTION")
        (fault,) = answer.json()["errors"]
        assert (fault["pointer"], fault["code"]) == ("/options/reset_state", "choice")
        assert "keep their own" in fault["detail"]


def test_so_is_the_start_of_a_training_that_was_created_with_it_before(login) -> None:
    site = Site(login, CONTROL)
    train(site)
    training = site.create({}).json()["training_id"]
    Training.objects.filter(pk=training).update(options={"reset_state": "never"})

    answer = site.actor.post(f"/api/trainings/{training}/start/")

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_OPTION")
    assert not Training.objects.get(pk=training).rounds.exists()


def test_never_is_harmless_for_a_model_that_was_uploaded(login) -> None:
    site = Site(login, MOMENTUM)
    site.options["reset_state"] = "never"

    train(site)

    np.testing.assert_array_equal(site.download()["w"], [2.0, 1.0])


def test_a_round_that_is_done_again_in_a_session_keeps_its_state(login) -> None:
    site = Site(login, Case("FedAvgM", vec(0.0, 0.0), [ROUND] * 2, [None] * 2, {"momentum": 0.5}))
    training = site.start()
    process_trainer_task(site.answer_round(0).pk)

    paused = site.actor.post(f"/api/trainings/{training}/pause/")
    resumed = site.actor.post(f"/api/trainings/{training}/resume/")
    process_trainer_task(site.answer_round(1).pk)

    assert (paused.status_code, resumed.status_code) == (200, 200)
    np.testing.assert_array_equal(site.download()["w"], [3.0, 1.5])


@pytest.mark.parametrize(
    ("method", "options", "code"),
    [
        ("FedAdam", {"reset_state": "never"}, "range"),  # the state is FedAvgM's
        ("FedAvgM", {"reset_state": "always"}, "choice"),
        ("FedAvgM", {"reset_state": True}, "type"),
        ("FedAvg", {"reset_state": "never"}, "unknown"),
        ("FedProx", {"reset_state": "session"}, "unknown"),  # only the adaptive mu is remembered
    ],
)
def test_what_cannot_be_kept_is_refused_with_a_pointer(login, method, options, code) -> None:
    site = Site(login, MOMENTUM)
    train(site)
    site.case = Case(method, vec(0.0, 0.0), [ROUND], [None])

    answer = site.create(options)

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_OPTION")
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"]) == ("/options/reset_state", code)


def test_the_api_and_the_admin_show_it_where_something_is_remembered(login, admin_client) -> None:
    site = Site(login, MOMENTUM)
    listed = {entry["name"]: entry for entry in site.actor.get("/api/aggregators/").json()}
    training = site.create({}).json()["training_id"]

    page = admin_client.get(f"/admin/fl_server_core/training/{training}/change/").content.decode()

    assert listed["FedAvgM"]["defaults"]["reset_state"] == "session"
    assert "reset_state" not in listed["FedAvg"]["options_schema"]["properties"]
    assert listed["SCAFFOLD"]["options_schema"]["properties"]["reset_state"]["enum"] == ["session"]
    assert "What is kept of the last direction" in page
    assert "reset_state" in page
