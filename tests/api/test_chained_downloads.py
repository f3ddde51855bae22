"""Daisy chaining over HTTP: a client that only knows the global model's id takes part unchanged."""

import io

import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from torch import nn

from fl_server_ai.services.trainings import training_create, training_start
from fl_server_core.models import GlobalModel, TrainerEvent
from tests.api.test_torch_models import download, saved, scripted, upload
from tests.scenes import Scene, person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def chained(login, rounds: int = 1, period: int = 3) -> Scene:
    actor = person("actor", actor=True)
    model_id = upload(login(actor), scripted(nn.Linear(2, 1))).json()["model_id"]
    sites = {name: person(name, client=True) for name in ("ada", "grace")}
    training = training_create(
        actor=actor, model=GlobalModel.objects.get(pk=model_id), target_num_updates=rounds,
        aggregation_method="FedDC", clients=[user.pk for user in sites.values()],
        options={
            "daisy_chain_period": period, "no_fixed_points": True, "skip_model_tests": True
        },
    )  # fmt: skip
    training_start(training=training, user=actor)
    return Scene(actor, sites, training.model, training)


def test_each_download_is_what_the_other_site_sent_in_torchscript_too(login) -> None:
    running = chained(login)
    path = f"/api/models/{running.training.model_id}/"
    sent: dict[str, dict[str, torch.Tensor]] = {}

    for number in range(3):
        got = {}
        for name, user in running.sites.items():
            client = login(user)
            module = torch.jit.load(io.BytesIO(download(client, path)))
            got[name] = {key: tensor.clone() for key, tensor in module.state_dict().items()}
            task = client.get("/api/tasks/").json()["task"]
            assert task["config"]["daisy_chain"] is True
            whole = download(
                client, task["model"]["url"], HTTP_ACCEPT="application/vnd.safetensors"
            )
            assert len(whole) == task["model"]["bytes"]
        if number:
            for name, other in (("ada", "grace"), ("grace", "ada")):
                for key, tensor in sent[other].items():
                    assert torch.equal(got[name][key], tensor)
        for index, (name, user) in enumerate(running.sites.items()):
            sent[name] = {key: tensor * (index + 2) for key, tensor in got[name].items()}
            body = {"round": number, "sample_size": 1,
                    "model_file": SimpleUploadedFile("m", saved(sent[name]))}  # fmt: skip
            assert login(user).post(path, body, format="multipart").status_code == 201
        running.work()

    final = torch.jit.load(io.BytesIO(download(login(running.actor), path))).state_dict()
    for key, tensor in final.items():
        assert torch.equal(tensor, (sent["ada"][key] + sent["grace"][key]) / 2)
    assert TrainerEvent.objects.filter(type="DaisyChainRoundFinished").count() == 2


def test_others_do_not_get_a_sites_model(login) -> None:
    running = chained(login)
    path = f"/api/models/{running.training.model_id}/"
    first = download(login(running.actor), path)
    for user in running.sites.values():
        state = torch.jit.load(io.BytesIO(first)).state_dict()
        other = {key: tensor + 1 for key, tensor in state.items()}
        body = {"round": 0, "sample_size": 1, "model_file": SimpleUploadedFile("m", saved(other))}
        login(user).post(path, body, format="multipart")
    running.work()

    assert download(login(running.actor), path) == first
    assert download(login(running.sites["ada"]), path) != first
    assert download(login(running.sites["ada"]), f"{path}?version=0") == first


def test_what_chaining_means_is_said_before_the_start(login) -> None:
    running = chained(login)

    for user in (running.actor, running.sites["ada"]):
        found = login(user).get(f"/api/trainings/{running.training.pk}/").json()
        assert "another site" in found["notices"][0]
    assert found["target_num_updates"] == 3
