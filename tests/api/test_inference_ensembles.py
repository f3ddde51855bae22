"""Local models as members, and trainings whose last updates are an ensemble of their model."""

import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_server_ai.inference import pool, working
from fl_server_ai.inference.draws import weights_of
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_core.models import Blob, GlobalModel, LocalModel, MeanMember, User
from fl_server_core.services.blobs import blobs_delete_doomed, blobs_doom_unreferenced
from tests.api.test_inference import X, ask, mean_of, network, options, scripted, upload
from tests.scenes import Scene, person, staged

pytestmark = pytest.mark.django_db
OWNER = uuid.UUID(int=7)
LOGITS = options(output="logits")


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    pool.close()


@pytest.fixture
def client(login) -> Any:
    return login(person("owner", id=OWNER, actor=True))


def moved(by: float) -> nn.Module:
    """The network after some local training."""
    module = network()
    with torch.no_grad():
        for at, parameter in enumerate(module.parameters()):
            parameter += by * (at + 1) * torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    return module


def training(client: Any, rounds: int = 1, method: str = "ENSEMBLE", **more: Any) -> Scene:
    owner = User.objects.get(pk=OWNER)
    sites = {name: person(name, client=True, actor=True) for name in ("ada", "grace")}
    made = training_create(
        actor=owner, model=GlobalModel.objects.get(pk=upload(client)), target_num_updates=rounds,
        aggregation_method="FedAvg", uncertainty_method=method,
        options={"skip_model_tests": True, **more}, clients=[user.pk for user in sites.values()],
    )  # fmt: skip
    training_start(training=made, user=owner)
    return Scene(owner, sites, made.model, made)


def send(running: Scene, site: str, by: float, samples: int) -> LocalModel:
    return update_submit(
        model_id=running.training.model_id, owner=running.sites[site], sample_size=samples,
        round=running.now.model.round, file=staged(scripted(moved(by))), sha256=None, metrics={},
    ).update  # fmt: skip


def one_round(running: Scene, *moves: float) -> list[LocalModel]:
    sent = [
        send(running, site, by, samples)
        for samples, (site, by) in zip((1, 3), zip(running.sites, moves, strict=True), strict=True)
    ]
    running.work()
    return sent


def mixture(*moves: float, shares: tuple[float, ...] = (0.25, 0.75)) -> Tensor:
    probs = torch.stack([moved(by)(X).softmax(1).double() for by in moves]).detach()
    return (probs * torch.tensor(shares, dtype=torch.float64)[:, None, None]).sum(0)


@pytest.mark.parametrize("delete", [True, False])
def test_a_training_with_the_method_is_asked_by_its_last_updates(
    client, login, delete: bool
) -> None:
    running = training(client, 2, delete_local_models_after_aggregation=delete)
    model = str(running.training.model_id)
    early = ask(client, model)
    one_round(running, 0.5, -0.5)
    between = ask(client, model, options=LOGITS)
    sent = one_round(running, 0.1, -0.2)

    last = ask(client, model, options=LOGITS)
    equal = ask(client, model, options=options(output="logits", weighting="equal"))
    plain = ask(client, model, uncertainty_method="NONE", options=options(task="regression"))

    assert (early.status_code, early.json()["code"]) == (422, "NO_MEMBERS")
    assert running.now.state == "C"
    np.testing.assert_allclose(between.json()["inference"], mixture(0.5, -0.5), rtol=1e-5)
    np.testing.assert_allclose(last.json()["inference"], mixture(0.1, -0.2), rtol=1e-5)
    halves = mixture(0.1, -0.2, shares=(0.5, 0.5))
    np.testing.assert_allclose(equal.json()["inference"], halves, rtol=1e-5)
    assert set(last.json()["uncertainty"]) >= {"variance", "mutual_info"}
    averaged = network()
    averaged.load_state_dict({
        name: 0.25 * moved(0.1).state_dict()[name] + 0.75 * moved(-0.2).state_dict()[name]
        for name in averaged.state_dict()
    })  # fmt: skip
    np.testing.assert_allclose(plain.json()["inference"], averaged(X).detach(), rtol=1e-4)
    # A site may ask the ensemble too, and gets at nobody's model by itself.
    assert ask(login(running.sites["ada"]), model, options=LOGITS).status_code == 200
    assert ask(login(running.sites["grace"]), str(sent[0].pk)).status_code == 404
    alone = client.get(f"/api/models/{sent[0].pk}/")
    alone.close()
    assert alone.status_code == (404 if delete else 200)


def test_files_of_members_stay_until_nobody_needs_them(client) -> None:
    running = training(client, 2)
    first = one_round(running, 0.5, -0.5)
    kept = [member.blob_id for member in MeanMember.objects.all()]
    for sent in first:
        sent.refresh_from_db()
    blobs_doom_unreferenced()
    blobs_delete_doomed()
    readable = [len(list(weights_of(blob))) for blob in Blob.objects.filter(pk__in=kept)]
    one_round(running, 0.1, -0.2)
    blobs_delete_doomed()

    assert [sent.blob_id for sent in first] == [None, None]
    assert readable == [4, 4]
    assert not Blob.objects.filter(pk__in=kept).exists()
    now = list(MeanMember.objects.values_list("blob_id", flat=True))
    assert client.delete(f"/api/trainings/{running.training.pk}/").status_code == 200
    blobs_delete_doomed()
    assert not Blob.objects.filter(pk__in=now).exists()
    plain = ask(client, str(running.training.model_id))
    assert (plain.status_code, plain.json()["uncertainty"]) == (200, {})


def test_updates_may_be_members_and_stay_when_their_training_gives_them_up(client) -> None:
    running = training(client, method="NONE")
    sent = [send(running, site, by, 1) for site, by in zip(running.sites, (0.3, -0.3), strict=True)]
    other = upload(client)
    made = mean_of(client, str(sent[0].pk), other, str(sent[1].pk), weights=[1.0, 2.0, 1.0])
    assert made.status_code == 201, made.json()
    mean = made.json()["model_id"]

    running.work()
    blobs_delete_doomed()
    answer = ask(client, mean, options=LOGITS)
    alone = mean_of(client, str(sent[0].pk))
    refused = client.delete(f"/api/trainings/{running.training.pk}/")

    expected = mixture(0.3, 0.0, -0.3, shares=(0.25, 0.5, 0.25))
    np.testing.assert_allclose(answer.json()["inference"], expected, rtol=1e-5)
    assert LocalModel.objects.filter(blob=None).count() == 2
    assert (alone.status_code, alone.json()["code"]) == (404, "FILE_DELETED")
    assert (refused.status_code, refused.json()["code"]) == (409, "MODEL_IN_USE")
    assert client.delete(f"/api/models/{mean}/").status_code == 200
    assert client.delete(f"/api/trainings/{running.training.pk}/").status_code == 200
    files = set(LocalModel.objects.values_list("blob_id", flat=True))
    blobs_delete_doomed()
    assert files == set()
    assert not Blob.objects.filter(members_of__isnull=False).exists()


def test_members_are_asked_only_by_those_who_still_see_them(client, login) -> None:
    running = training(client, method="NONE", delete_local_models_after_aggregation=False)
    ada = login(running.sites["ada"])
    sent = one_round(running, 0.3, -0.3)
    own = mean_of(ada, str(sent[0].pk), str(running.training.model_id))
    others = mean_of(ada, str(sent[1].pk))
    asked = ask(ada, own.json()["model_id"])
    running.training.memberships.update(removed_at=running.training.created_at)
    later = ask(ada, own.json()["model_id"])

    assert (own.status_code, asked.status_code) == (201, 200)
    assert (others.status_code, later.status_code) == (404, 404)
    twice = mean_of(client, str(sent[1].pk), str(sent[1].pk))
    assert (twice.status_code, twice.json()["code"]) == (400, "BAD_MEMBERS")


def test_an_update_alone_has_no_members(client) -> None:
    running = training(client, delete_local_models_after_aggregation=False)
    sent = one_round(running, 0.3, -0.3)

    usual = ask(client, str(sent[0].pk))
    plain = ask(client, str(sent[0].pk), uncertainty_method="NONE")

    assert (usual.status_code, usual.json()["code"]) == (422, "NO_MEMBERS")
    assert plain.json()["inference"] == moved(0.3)(X).argmax(1).tolist()


def test_who_takes_part_is_told_before_the_start_that_models_are_kept(client) -> None:
    body = {
        "model_id": upload(client), "target_num_updates": 1, "metric_names": [],
        "aggregation_method": "FedAvg", "uncertainty_method": "ENSEMBLE",
        "options": options(weighting="equal"),
    }  # fmt: skip

    made = client.post("/api/trainings/", body)
    wrong = client.post("/api/trainings/", {**body, "options": options(weighting="odd")})

    told = client.get(f"/api/trainings/{made.json()['training_id']}/").json()
    assert told["notices"][0].startswith("Ensemble:")
    assert (wrong.status_code, wrong.json()["code"]) == (400, "BAD_OPTION")


def test_daisy_chained_models_are_an_ensemble_too(client) -> None:
    running = training(client, daisy_chain_period=2)
    one_round(running, 0.9, -0.9)
    assert not MeanMember.objects.exists()
    one_round(running, 0.2, -0.1)

    body = ask(client, str(running.training.model_id), options=LOGITS).json()

    np.testing.assert_allclose(body["inference"], mixture(0.2, -0.1), rtol=1e-5)


def test_one_member_at_a_time_is_read(client, monkeypatch: pytest.MonkeyPatch) -> None:
    running = training(client, method="NONE")
    sent = [send(running, site, by, 1) for site, by in zip(running.sites, (0.3, -0.3), strict=True)]
    first, second = upload(client, scripted(moved(0.7))), upload(client, scripted(moved(0.9)))
    ids = [str(sent[0].pk), str(sent[1].pk), first, second]
    mean = mean_of(client, *ids).json()["model_id"]
    alive: list[int] = []
    most: list[int] = []

    def watched(blob: Blob) -> Iterator[Any]:
        alive.append(blob.pk)
        most.append(len(alive))
        yield from weights_of(blob)
        alive.pop()

    monkeypatch.setattr(working, "weights_of", watched)
    answer = ask(client, mean, options=LOGITS)

    np.testing.assert_allclose(
        answer.json()["inference"], mixture(0.3, -0.3, 0.7, 0.9, shares=(0.25,) * 4), rtol=1e-5
    )
    assert most == [1, 1]
