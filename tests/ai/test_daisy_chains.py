"""Federated daisy-chaining: models go from site to site, and are averaged when it is time."""

import collections
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fl_server_ai.services.chaining import AGGREGATE, CHAIN, CONTINUE, step_after
from fl_server_ai.services.models import weights_for
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.training_options import TrainerOptions
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_ai.services.updates import update_submit
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import DomainError
from fl_server_core.lifecycle import TrainingState
from fl_server_core.models import (
    Blob,
    LocalModel,
    ModelVersion,
    Notification,
    Round,
    TrainerEvent,
    Training,
)
from fl_server_core.services.chains import chain_permute
from fl_server_core.services.trainings import training_add_clients
from fl_server_core.storage import local_path
from tests.scenes import Arrays, Scene, person, scene, staged

pytestmark = pytest.mark.django_db
SAMPLES = {"ada": 3, "grace": 5, "joan": 7, "mary": 11}


def trained(weights: Arrays, site: str, round: int) -> Arrays:
    """What a site makes of a model: different for every site and round, and the order shows."""
    step = np.float32(list(SAMPLES).index(site) + 1)
    return {
        name: (array * step + round if array.dtype == np.float32 else array)
        for name, array in weights.items()
    }


def start_of(running: Scene, site: str) -> Arrays:
    """As a client that knows only the model's id gets it."""
    running.training.refresh_from_db()
    blob = weights_for(model=running.now.model, user=running.sites[site])
    with local_path(blob) as path:
        return load(path.read_bytes())


def send(running: Scene, site: str) -> None:
    number = running.now.model.round
    update = trained(start_of(running, site), site, number)
    update_submit(
        model_id=running.training.model_id, owner=running.sites[site], round=number,
        sample_size=SAMPLES[site], file=staged(save(update)), sha256=None, metrics={},
    )  # fmt: skip


def run(running: Scene, *, rounds: int) -> None:
    for _ in range(rounds):
        for site in running.sites:
            send(running, site)
        running.work()


def mean(models: list[Arrays], weights: list[int]) -> Arrays:
    total = sum(weights)
    return {
        name: (
            sum(n * model[name].astype(np.float64) for n, model in zip(weights, models, strict=True))
            / total
        ).astype(np.float32)
        for name in models[0]
        if models[0][name].dtype == np.float32
    }  # fmt: skip


def same(found: Arrays, expected: Arrays) -> None:
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_chains_are_those_of_the_paper_bit_for_bit() -> None:
    running = scene(*SAMPLES, rounds=2, method="FedDC", daisy_chain_period=3, skip_model_tests=True)
    assert running.training.target_num_updates == 6
    names = {str(user.pk): name for name, user in running.sites.items()}
    world = running.current()
    models = dict.fromkeys(SAMPLES, world)

    for number in range(6):
        opened = running.round
        if number % 3:
            chain = opened.chain
            assert sorted(chain) == sorted(names)
            owner = {str(pk): names[str(user)] for pk, user in
                     LocalModel.objects.values_list("pk", "owner_id")}  # fmt: skip
            models = {names[to]: models[owner[update]] for to, update in chain.items()}
        else:
            assert opened.chain is None
            models = dict.fromkeys(SAMPLES, world)
        for site in SAMPLES:
            same(start_of(running, site), models[site])
            models[site] = trained(models[site], site, number)
        run(running, rounds=1)
        if number % 3 == 2:
            order = sorted(SAMPLES, key=lambda name: running.sites[name].pk)
            world = {
                **world,
                **mean([models[name] for name in order], [SAMPLES[name] for name in order]),
            }
            same(running.current(), world)

    assert running.now.state == TrainingState.COMPLETED
    assert list(ModelVersion.objects.order_by("number").values_list("number", flat=True)) == [
        0,
        3,
        6,
    ]
    assert [event.type for event in TrainerEvent.objects.order_by("round__number")] == [
        "DaisyChainRoundFinished", "DaisyChainRoundFinished", "TrainingRoundFinished",
    ] * 2  # fmt: skip
    assert not LocalModel.objects.filter(blob__isnull=False).exists()
    assert Blob.objects.filter(doomed_at=None).count() == 3


def test_chain_steps_are_not_tested_and_averages_are() -> None:
    running = scene(rounds=1, daisy_chain_period=2, endpoint="https://example.org/hook")

    run(running, rounds=1)
    assert running.round.phase == "notifying"
    run(running, rounds=1)

    assert running.round.phase == "testing"
    tests = Notification.objects.filter(type="MODEL_TEST_ROUND")
    assert {note.body["round"] for note in tests} == {2}


@pytest.mark.parametrize(
    ("options", "target", "steps"),
    [
        ({}, 3, "AAA"),
        ({"daisy_chain_period": 3}, 6, "CCACCA"),
        ({"daisy_chain_period": 3}, 5, "CCACA"),
        ({"daisy_chain_period": 1}, 3, "AAA"),
        ({"daisy_chain_period": 2, "aggregation_period": 4}, 6, "CCCACA"),
        ({"daisy_chain_period": 2, "aggregation_period": None}, 4, "CCCA"),
        ({"daisy_chain_period": 4, "chain_period": 2}, 8, "-C-A-C-A"),
        ({"daisy_chain_period": 4, "chain_period": 2, "aggregation_period": None}, 6, "-C-C-A"),
        ({"daisy_chain_period": 6, "chain_period": 4, "aggregation_period": 6}, 12, "---C-A-C---A"),
    ],
)
def test_what_follows_each_local_round(options: dict[str, Any], target: int, steps: str) -> None:
    letters = {AGGREGATE: "A", CHAIN: "C", CONTINUE: "-"}
    chosen = TrainerOptions(**options)

    found = [step_after(chosen, round=number, target=target) for number in range(target)]

    assert "".join(letters[step] for step in found) == steps


def test_between_two_chain_steps_everybody_goes_on_with_his_own() -> None:
    running = scene(rounds=1, daisy_chain_period=4, chain_period=2, skip_model_tests=True)
    before = {site: trained(start_of(running, site), site, 0) for site in running.sites}

    run(running, rounds=1)

    for site in running.sites:
        same(start_of(running, site), before[site])


def test_who_drops_out_leaves_his_model_and_who_joins_begins_with_the_global_one() -> None:
    running = scene("ada", "grace", "joan", rounds=1, daisy_chain_period=4, skip_model_tests=True)
    run(running, rounds=1)
    for site in ("ada", "grace"):
        send(running, site)
    lost = running.task("joan").continues
    training_clients_remove(
        training=running.now, user=running.actor, clients=[running.sites["joan"].pk]
    )
    running.work()

    waiting = {
        str(pk) for pk in LocalModel.objects.filter(state="accepted").values_list("pk", flat=True)
    }
    assert len(running.round.chain) == 2
    assert str(lost.pk) in waiting
    assert set(running.round.chain.values()) < waiting

    for number in (2, 3):
        for site in ("ada", "grace"):
            send(running, site)
        alive = [
            update for update in LocalModel.objects.filter(state="accepted").select_related("blob")
            if not update.continued_by.exists()
        ]  # fmt: skip
        models = {update.pk: update for update in alive}
        if number == 3:
            weighed = sorted(models.values(), key=lambda one: (one.owner_id, one.round.number))
            arrays = []
            for update in weighed:
                with local_path(update.blob) as path:
                    arrays.append(load(path.read_bytes()))
        running.work()

    assert running.now.state == TrainingState.COMPLETED
    assert len(weighed) == 3
    same(running.current(), mean(arrays, [update.sample_size for update in weighed]))


@pytest.mark.parametrize("weight", ["last", "chain_samples"])
def test_chains_count_by_the_last_site_or_by_all_since_the_last_average(weight: str) -> None:
    running = scene(
        "ada", "grace", "joan", rounds=1, daisy_chain_period=2, skip_model_tests=True,
        chain_weight=weight, no_fixed_points=True,
    )  # fmt: skip
    run(running, rounds=1)
    chain = running.round.chain
    names = {str(user.pk): name for name, user in running.sites.items()}
    owners = {str(one.pk): names[str(one.owner_id)] for one in LocalModel.objects.all()}
    models, weights = [], []
    for site in sorted(running.sites, key=lambda name: running.sites[name].pk):
        before = owners[chain[str(running.sites[site].pk)]]
        models.append(trained(start_of(running, site), site, 1))
        weights.append(SAMPLES[site] + (SAMPLES[before] if weight == "chain_samples" else 0))

    run(running, rounds=1)

    same(running.current(), mean(models, weights))
    assert ModelVersion.objects.get(number=2).total_examples == sum(weights)


def test_who_joins_in_the_middle_begins_with_the_global_model() -> None:
    running = scene("ada", "grace", rounds=1, daisy_chain_period=3, skip_model_tests=True)
    joan = person("joan", client=True)
    for site in running.sites:
        send(running, site)
    training_add_clients(training=running.training, user=running.actor, clients=[joan.pk])
    running.work()

    assert sorted(running.round.chain) == sorted(str(u.pk) for u in [joan, *running.sites.values()])
    assert list(running.round.chain.values()).count(None) == 1


def test_a_model_that_waits_is_taken_over_before_the_global_one() -> None:
    running = scene(
        "ada", "grace", "joan", rounds=1, daisy_chain_period=4, chain_period=2,
        skip_model_tests=True, no_fixed_points=True, min_updates=2,
    )  # fmt: skip
    run(running, rounds=2)
    orphan = running.task("joan").continues
    for site in ("ada", "grace"):
        send(running, site)
    Round.objects.filter(number=2).update(deadline="2020-01-01T00:00:00Z")
    sweep()
    running.work()

    assert running.round.number == 3
    assert running.task("joan").continues == orphan
    assert None not in running.round.chain.values()


def test_models_that_have_waited_go_on_before_those_that_have_not() -> None:
    sites = ("ada", "grace", "joan", "mary")
    running = scene(*sites, rounds=1, daisy_chain_period=6, skip_model_tests=True)
    run(running, rounds=1)
    waiting = {str(running.task(site).continues.pk) for site in ("joan", "mary")}
    training_clients_remove(
        training=running.now,
        user=running.actor,
        clients=[running.sites[site].pk for site in ("joan", "mary")],
    )

    for site in ("ada", "grace"):
        send(running, site)
    running.work()

    assert running.round.number == 2
    assert set(running.round.chain.values()) == waiting


def chained(*names: str) -> tuple[Training, list[Any]]:
    running = scene(*names, rounds=1, daisy_chain_period=9, skip_model_tests=True)
    for site in running.sites:
        send(running, site)
    return running.training, sorted(running.sites.values(), key=lambda user: user.pk)


def draw(training: Training, users: list[Any], number: int, **options: bool) -> tuple[int, ...]:
    taken = chain_permute(training, number, users, **{"no_fixed_points": False, **options})
    place = {user.pk: index for index, user in enumerate(users)}
    return tuple(place[taken[user.pk].owner_id] for user in users)


def test_the_permutation_is_uniform_and_repeatable() -> None:
    training, users = chained("ada", "grace", "joan")

    drawn = [draw(training, users, number) for number in range(1200)]

    assert drawn[:50] == [draw(training, users, number) for number in range(50)]
    counts = collections.Counter(drawn)
    assert len(counts) == 6
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 20.5  # 5 degrees of freedom, one in a thousand
    training.seed += 1
    assert drawn[:50] != [draw(training, users, number) for number in range(50)]


def test_without_fixed_points_nobody_gets_his_own_and_one_alone_still_goes_on() -> None:
    training, users = chained("ada", "grace", "joan", "mary")

    drawn = [draw(training, users, number, no_fixed_points=True) for number in range(300)]

    assert all(own != got for one in drawn for own, got in enumerate(one))
    assert len(set(drawn)) == 9  # all derangements of four
    assert chain_permute(training, 0, users[:1], no_fixed_points=True)[users[0].pk] is not None


def test_a_step_handled_twice_counts_once() -> None:
    running = scene(rounds=1, daisy_chain_period=3, skip_model_tests=True)
    for site in running.sites:
        send(running, site)
    event = TrainerEvent.objects.get()

    process_trainer_task(event.pk)
    process_trainer_task(event.pk)
    TrainerEvent.objects.filter(pk=event.pk).update(state="pending")
    process_trainer_task(event.pk)

    assert running.now.model.round == 1
    assert Round.objects.count() == 2


@pytest.mark.parametrize(
    ("method", "options", "pointer"),
    [
        ("FedDC", {}, "/options/daisy_chain_period"),
        ("FedDC", {"daisy_chain_period": 0}, "/options/daisy_chain_period"),
        ("FedAvg", {"chain_period": 2}, "/options/daisy_chain_period"),
        ("FedDC", {"daisy_chain_period": 2, "chain_period": 3}, "/options/chain_period"),
        ("FedDC", {"daisy_chain_period": -1}, "/options/daisy_chain_period"),
        ("FedDC", {"daisy_chain_period": 2, "chain_weight": "x"}, "/options/chain_weight"),
        ("FLTrust", {"daisy_chain_period": 2}, "/options/daisy_chain_period"),
    ],
)
def test_options_that_make_no_chain_are_refused(
    method: str, options: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(DomainError) as refusal:
        scene(method=method, **options)

    assert refusal.value.error_code == "BAD_OPTION"
    assert refusal.value.data["errors"][0]["pointer"] == pointer
