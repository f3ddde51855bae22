"""SWAG rounds: moments are asked for, checked, combined as artifacts of the round, and the training goes on."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fl_client import SwagCollector
from fl_server_ai.services.moments import moments_submit
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.training_options import options_validate
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import DomainError
from fl_server_core.models import Blob, Notification, Round, SwagMoments, TrainerEvent
from fl_server_core.storage import local_path
from tests.scenes import Scene, scene, staged

pytestmark = pytest.mark.django_db
HOOK = "https://site.example/hook"


def walk(seed: int, steps: int = 5) -> list[dict[str, np.ndarray]]:
    """Weights along some local training."""
    draw = np.random.default_rng(seed)
    return [
        {
            "layer.weight": draw.standard_normal((3, 2)).astype(np.float32),
            "layer.bias": draw.standard_normal(3).astype(np.float32),
            "steps": np.array(step),
        }
        for step in range(steps)
    ]


def moments(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    collector = SwagCollector()
    for weights in walk(seed):
        collector.add(weights)
    found = collector.result(1)
    return dict(found.first), dict(found.second)


def send(
    running: Scene, site: str, first: dict[str, Any], second: dict[str, Any], samples: int = 1
) -> tuple[SwagMoments, bool]:
    return moments_submit(
        model_id=running.training.model_id, owner=running.sites[site],
        round=running.now.model.round, sample_size=samples,
        first=staged(save(first)), second=staged(save(second)),
    )  # fmt: skip


def started(rounds: int = 1, **options: Any) -> Scene:
    return scene(rounds=rounds, uncertainty="SWAG", endpoint=HOOK, **options)


def aggregated(running: Scene) -> Scene:
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    running.work()
    return running


def stored(one: SwagMoments) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with local_path(one.first) as first, local_path(one.second) as second:
        return load(first.read_bytes()), load(second.read_bytes())


def test_moments_of_all_sites_are_those_of_their_mixture() -> None:
    running = aggregated(started(skip_model_tests=True))
    assert (running.now.state, running.round.phase) == ("S", "swag")
    sent = {site: moments(seed) for seed, site in enumerate(running.sites)}

    for samples, (site, pair) in zip((2, 6), sent.items(), strict=True):
        send(running, site, *pair, samples=samples)
    running.work()

    combined = SwagMoments.objects.get(owner=None)
    first, second = stored(combined)
    for name in ("layer.weight", "layer.bias"):
        for found, index in ((first, 0), (second, 1)):
            mixed = 0.25 * sent["ada"][index][name] + 0.75 * sent["grace"][index][name]
            np.testing.assert_allclose(found[name], mixed, rtol=1e-12)
            assert found[name].dtype == np.float64
    assert running.now.state == "C"
    assert combined.sample_size == 8
    assert not SwagMoments.objects.filter(owner__isnull=False, first__isnull=False).exists()
    types = list(Notification.objects.filter(receiver=running.sites["ada"]).order_by("created_at", "id")
                 .values_list("type", flat=True))  # fmt: skip
    assert types == [
        "TRAINING_START",
        "UPDATE_ROUND_START",
        "SWAG_ROUND_START",
        "TRAINING_FINISHED",
    ]
    assert Notification.objects.filter(type="SWAG_ROUND_START").first().body["round"] == 1


@pytest.mark.parametrize(
    ("variance", "spread"),
    [("within", "within"), ("between", "between"), ("total", "total")],
)
def test_the_spread_is_the_one_that_was_chosen(variance: str, spread: str) -> None:
    running = aggregated(
        scene(
            rounds=1,
            skip_model_tests=True,
            uncertainty="SWAG",
            uncertainty_options={"variance": variance},
        )
    )
    sent = [moments(seed) for seed in range(2)]
    for site, pair in zip(running.sites, sent, strict=True):
        send(running, site, *pair)
    running.work()

    first, second = stored(SwagMoments.objects.get(owner=None))
    means = np.stack([one[0]["layer.bias"] for one in sent])
    squares = np.stack([one[1]["layer.bias"] for one in sent])
    parts = {"within": (squares - means**2).mean(0), "between": means.var(0)}
    parts["total"] = parts["within"] + parts["between"]
    np.testing.assert_allclose(
        second["layer.bias"] - first["layer.bias"] ** 2, parts[spread], rtol=1e-9
    )


@pytest.mark.parametrize(
    ("swag_rounds", "asked"), [("last", [3]), ("every", [1, 2, 3]), (2, [2, 3]), (0, [3]), (5, [3])]
)
def test_moments_are_asked_for_when_the_options_say_so(swag_rounds: Any, asked: list[int]) -> None:
    running = started(rounds=3, swag_rounds=swag_rounds, skip_model_tests=True)
    for _ in range(3):
        aggregated(running)
        if running.now.state == "S":
            for site in running.sites:
                send(running, site, *moments(1))
            running.work()

    assert running.now.state == "C"
    rounds = SwagMoments.objects.filter(owner=None).values_list("round__number", flat=True)
    assert sorted(number + 1 for number in rounds) == asked


def test_a_test_follows_the_swag_round() -> None:
    running = aggregated(started())
    for site in running.sites:
        send(running, site, *moments(1))
    running.work()

    assert (running.now.state, running.round.phase) == ("O", "testing")


def test_the_same_moments_again_are_fine_and_others_are_not() -> None:
    running = aggregated(started())
    _, created = send(running, "ada", *moments(1))
    _, again = send(running, "ada", *moments(1))

    assert (created, again) == (True, False)
    with pytest.raises(DomainError) as refusal:
        send(running, "ada", *moments(2))
    assert refusal.value.error_code == "DUPLICATE"
    assert Blob.objects.filter(doomed_at=None).count() == 4  # two versions, and one pair


BAD: dict[str, tuple[Any, str]] = {
    "a second moment below the square": (lambda f, s: s["layer.bias"].__setitem__(1, -1.0), "MOMENTS_INCONSISTENT"),
    "slightly below": (lambda f, s: s["layer.bias"].__setitem__(1, f["layer.bias"][1] ** 2 * 0.99), "MOMENTS_INCONSISTENT"),
    "NaN": (lambda f, s: f["layer.bias"].__setitem__(0, np.nan), "NON_FINITE"),
    "infinity": (lambda f, s: s["layer.bias"].__setitem__(0, np.inf), "NON_FINITE"),
    "no second moments": (lambda f, s: s.clear(), "KEY_MISMATCH"),
    "a second moment without a first": (lambda f, s: f.pop("layer.bias"), "KEY_MISMATCH"),
    "an unknown tensor": (lambda f, s: f.update(x=np.ones(1)), "KEY_MISMATCH"),
    "another shape": (lambda f, s: f.update({"layer.bias": np.ones(4)}), "SHAPE_MISMATCH"),
    "integers": (lambda f, s: s.update({"layer.bias": np.ones(3, np.int64)}), "MOMENTS_INCONSISTENT"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_moments_that_no_weights_have_are_refused_at_upload(name: str) -> None:
    running = aggregated(started())
    spoil, code = BAD[name]
    first, second = moments(1)
    spoil(first, second)

    with pytest.raises(DomainError) as refusal:
        send(running, "ada", first, second)

    assert refusal.value.error_code == code
    assert not SwagMoments.objects.exists()
    assert running.task("ada", "swag").state == "open"


def test_constant_weights_have_consistent_moments_in_single_precision() -> None:
    running = aggregated(started())
    first = {"layer.bias": np.full(3, 1234.567, np.float32)}

    send(running, "ada", first, {"layer.bias": first["layer.bias"] ** 2})


def test_missing_moments_end_the_training_with_a_reason_or_count_as_gone() -> None:
    running = aggregated(started(min_updates=2))
    send(running, "ada", *moments(1))

    Round.objects.update(deadline="2020-01-01T00:00:00Z")
    sweep()

    assert running.now.state == "E"
    assert running.now.reason.startswith("NOT_ENOUGH_MOMENTS")


def test_enough_moments_at_the_deadline_go_on() -> None:
    running = aggregated(started(skip_model_tests=True))
    send(running, "ada", *moments(1))

    Round.objects.update(deadline="2020-01-01T00:00:00Z")
    sweep()
    running.work()

    assert running.now.state == "C"


def test_updates_are_not_taken_in_a_swag_round_nor_moments_outside() -> None:
    running = started()
    with pytest.raises(DomainError) as early:
        send(running, "ada", *moments(1))
    aggregated(running)
    with pytest.raises(DomainError) as late:
        running.send("ada", 1.0)

    assert early.value.error_code == "ROUND_CLOSED"
    assert late.value.error_code == "TRAINING_NOT_RUNNING"


def test_a_swag_event_handled_twice_combines_once() -> None:
    running = aggregated(started())
    for site in running.sites:
        send(running, site, *moments(1))
    event = TrainerEvent.objects.get(type="SWAGRoundFinished")

    process_trainer_task(event.pk)
    TrainerEvent.objects.filter(pk=event.pk).update(state="pending")
    process_trainer_task(event.pk)

    assert SwagMoments.objects.filter(owner=None).count() == 1
    assert running.round.phase == "testing"


def test_daisy_chains_and_swag_go_together() -> None:
    running = started(rounds=1, daisy_chain_period=2, skip_model_tests=True)
    aggregated(running)
    assert running.now.state == "O"
    aggregated(running)
    assert running.now.state == "S"
    for site in running.sites:
        send(running, site, *moments(1))
    running.work()

    assert running.now.state == "C"


def deviations(seed: int, rank: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    collector = SwagCollector(rank=rank)
    for weights in walk(seed):
        collector.add(weights)
    found = collector.result(1)
    return dict(found.first), dict(found.second), dict(found.deviations or {})


def send_all(running: Scene, site: str, rank: int, seed: int = 1, **spoilt: Any) -> SwagMoments:
    first, second, columns = deviations(seed, rank)
    return moments_submit(
        model_id=running.training.model_id, owner=running.sites[site], round=1, sample_size=1,
        first=staged(save(first)), second=staged(save(second)),
        deviations=staged(save({**columns, **spoilt})),
    )[0]  # fmt: skip


def covariance(columns: np.ndarray) -> np.ndarray:
    flat = columns.reshape(len(columns), -1).astype(np.float64)
    return flat.T @ flat / (len(columns) - 1)


def test_with_all_steps_kept_the_deviations_are_the_covariance_of_the_sites_mixture() -> None:
    running = aggregated(started(skip_model_tests=True, swag_rank=12))
    for seed, site in enumerate(running.sites):
        send_all(running, site, 5, seed)
    running.work()

    combined = SwagMoments.objects.get(owner=None)
    with local_path(combined.deviations) as path:
        found = load(path.read_bytes())
    steps = [[w["layer.weight"].reshape(-1).astype(np.float64) for w in walk(s)] for s in range(2)]
    means = np.stack([np.mean(one, axis=0) for one in steps])
    off = means - means.mean(0)
    expected = sum(np.cov(np.stack(one), rowvar=False) for one in steps) / 2 + off.T @ off / 2
    assert (found["layer.weight"].shape, found["layer.weight"].dtype) == ((12, 3, 2), np.float32)
    np.testing.assert_allclose(covariance(found["layer.weight"]), expected, rtol=1e-5, atol=1e-6)
    assert set(found) == {"layer.weight", "layer.bias"}
    assert running.now.state == "C"
    assert running.round.warnings == []
    assert not SwagMoments.objects.filter(owner__isnull=False, deviations__isnull=False).exists()


def test_who_sends_no_deviations_takes_part_and_the_round_tells() -> None:
    running = aggregated(started(skip_model_tests=True, swag_rank=3))
    send_all(running, "ada", 3)
    send(running, "grace", *moments(2))
    running.work()

    combined = SwagMoments.objects.get(owner=None)
    with local_path(combined.deviations) as path:
        assert load(path.read_bytes())["layer.bias"].shape == (3, 3)
    assert running.now.state == "C"
    assert running.round.warnings[0].startswith("SWAG: 1 of 2 participants sent no deviations")
    assert "3 of 5 columns" in running.round.warnings[1]


def test_without_any_deviations_the_round_has_none() -> None:
    running = aggregated(started(skip_model_tests=True, swag_rank=3))
    for site in running.sites:
        send(running, site, *moments(2))
    running.work()

    assert SwagMoments.objects.get(owner=None).deviations is None
    assert "draws are diagonal" in running.round.warnings[0]


SPOILT: dict[str, tuple[int, dict[str, Any], str]] = {
    "too many": (4, {}, "DEVIATIONS"),
    "another shape": (3, {"layer.bias": np.ones((3, 4), np.float32)}, "SHAPE_MISMATCH"),
    "another number": (3, {"layer.bias": np.ones((2, 3), np.float32)}, "SHAPE_MISMATCH"),
    "an unknown tensor": (3, {"x": np.ones((3, 1), np.float32)}, "KEY_MISMATCH"),
    "infinity": (3, {"layer.bias": np.full((3, 3), np.inf, np.float32)}, "NON_FINITE"),
    "integers": (3, {"layer.bias": np.ones((3, 3), np.int64)}, "DEVIATIONS"),
    "a number": (3, {"layer.bias": np.array(1, np.float32)}, "DEVIATIONS"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_deviations_that_do_not_fit_are_refused_at_upload(name: str) -> None:
    running = aggregated(started(swag_rank=3))
    rank, spoilt, code = SPOILT[name]

    with pytest.raises(DomainError) as refusal:
        send_all(running, "ada", rank, **spoilt)

    assert refusal.value.error_code == code
    assert not SwagMoments.objects.exists()
    assert running.task("ada", "swag").state == "open"


def test_deviations_nobody_asked_for_are_refused() -> None:
    running = aggregated(started())

    with pytest.raises(DomainError, match="takes none") as refusal:
        send_all(running, "ada", 3)

    assert refusal.value.error_code == "DEVIATIONS"
    with pytest.raises(DomainError, match="swag_rank"):
        options_validate(
            aggregation_method="FedAvg", uncertainty_method="SWAG", options={"swag_rank": 1}
        )
