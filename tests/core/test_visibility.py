import pytest

from fl_server_core.exceptions import NotFound
from fl_server_core.models import Metric
from fl_server_core.selectors import (
    get_visible,
    local_models_visible_to,
    metrics_visible_to,
    models_visible_to,
    tasks_visible_to,
    trainings_visible_to,
    users_visible_to,
)
from fl_server_core.services.trainings import training_drop_clients
from tests.scenes import person, scene

pytestmark = pytest.mark.django_db


def test_an_outsider_sees_nothing_but_himself() -> None:
    running = scene()
    running.send("ada", 1.0)
    outsider = person("outsider", client=True)

    for visible in (
        trainings_visible_to,
        models_visible_to,
        local_models_visible_to,
        metrics_visible_to,
        tasks_visible_to,
    ):
        assert not visible(outsider).exists(), visible.__name__
    assert list(users_visible_to(outsider)) == [outsider]


def test_a_participant_sees_the_training_but_not_what_others_sent() -> None:
    running = scene()
    running.send("ada", 1.0)
    ada, grace = running.sites["ada"], running.sites["grace"]

    assert trainings_visible_to(grace).get() == running.training
    assert not local_models_visible_to(grace).exists()
    assert local_models_visible_to(ada).count() == 1
    assert local_models_visible_to(running.actor).count() == 1


def test_a_participant_sees_own_and_common_metrics_only() -> None:
    running = scene()
    model = running.training.model
    for reporter in (running.sites["ada"], running.sites["grace"], None):
        Metric.objects.create(model=model, key="loss", step=0, value_float=1, reporter=reporter)

    reporters = {m.reporter for m in metrics_visible_to(running.sites["ada"])}

    assert reporters == {running.sites["ada"], None}
    assert metrics_visible_to(running.actor).count() == 3


def test_who_was_removed_sees_the_training_no_more() -> None:
    running = scene()
    ada = running.sites["ada"]

    training_drop_clients(training=running.training, user=running.actor, clients=[ada.pk])

    assert not trainings_visible_to(ada).exists()
    assert not models_visible_to(ada).exists()


@pytest.mark.parametrize("pk", ["", "x", "1", "00000000-0000-0000-0000-000000000000", "é" * 400])
def test_malformed_unknown_and_invisible_ids_look_the_same(pk: str) -> None:
    with pytest.raises(NotFound):
        get_visible(trainings_visible_to(person("ada")), pk)


def test_an_actor_sees_the_clients_that_he_may_invite() -> None:
    running = scene()

    assert {u.username for u in users_visible_to(running.actor)} == {"actor", "ada", "grace"}
