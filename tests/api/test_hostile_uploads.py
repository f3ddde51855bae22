"""Hostile files over HTTP: refused with a code, and nothing of them is kept anywhere."""

from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.files.uploadedfile import SimpleUploadedFile

from fl_server_core.lifecycle import TrainingState
from fl_server_core.models import Blob, GlobalModel, LocalModel
from tests.ai.hostile import CORPUS, HONEST, MARKER
from tests.api.conftest import Login
from tests.scenes import person, scene

pytestmark = pytest.mark.django_db
# One of each kind, for the other doors that files come in by.
FEW = [
    "calls os.system",
    "calls torch.storage._load_from_bytes",
    "os.system in an attribute of a module",
    "a storage with a path upwards",
    "a dict in itself",
    "a wrong CRC in data/0",
    "a bomb in a debug file",
    "a tensor longer than its storage",
    "a script that says torch.save",
    "a script that calls os.system",
    "an export whose weights are a pickle",
    "an export with compiled code",
    "safetensors with overlapping tensors",
    "npz of pickled objects",
]


def kept() -> set[Path]:
    """All files in staging and storage; a folder for rendered files comes and goes."""
    folder = Path(django_settings.FL_DATA_DIR)
    found = {path for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if "sqlite3" not in path.name}


def hostile(name: str) -> SimpleUploadedFile:
    return SimpleUploadedFile("model.pt", CORPUS[name].build())


def refused(response: Any, name: str) -> None:
    assert 400 <= response.status_code < 500, response.content
    assert response.json()["code"] in CORPUS[name].codes, response.json()
    assert not MARKER.exists()


# All of them are read as files in every run (tests/ai/test_hostile_files.py); over HTTP nightly.
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(list(CORPUS)[::10], id="every tenth"),
        pytest.param(list(CORPUS), id="all", marks=pytest.mark.heavy),
    ],
)
def test_hostile_updates_are_refused_and_the_round_goes_on(
    login: Login, subtests: pytest.Subtests, names: list[str]
) -> None:
    running = scene()
    client = login(running.sites["ada"])
    url = f"/api/models/{running.training.model_id}/"
    before, weights = kept(), running.digest()

    for name in names:
        with subtests.test(name):
            body = {"round": 0, "sample_size": 1, "model_file": hostile(name)}
            response = client.post(url, body, format="multipart")

            refused(response, name)
            assert kept() == before
            assert running.digest() == weights
            assert (running.now.state, running.round.number) == (TrainingState.ONGOING, 0)
            assert running.task("ada").state == "open"
            assert not LocalModel.objects.exists()
            assert Blob.objects.count() == 1

    assert running.send("ada", 1.0).created


@pytest.mark.parametrize("name", FEW)
def test_a_hostile_model_is_refused(login: Login, name: str) -> None:
    actor = person("actor", actor=True)
    before = kept()

    body = {"name": "net", "description": "-", "model_file": hostile(name)}
    response = login(actor).post("/api/models/", body, format="multipart")

    refused(response, name)
    assert kept() == before
    assert not GlobalModel.objects.exists()
    assert not Blob.objects.exists()


@pytest.mark.parametrize("name", FEW)
def test_hostile_preprocessing_is_refused_with_a_model_and_for_one(login: Login, name: str) -> None:
    running = scene()
    client = login(running.actor)
    before = kept()

    body = {
        "name": "net", "description": "-", "model_file": SimpleUploadedFile("m", HONEST["npz"]()),
        "model_preprocessing_file": hostile(name),
    }  # fmt: skip
    with_model = client.post("/api/models/", body, format="multipart")
    alone = client.post(
        f"/api/models/{running.model.pk}/preprocessing/",
        {"model_preprocessing_file": hostile(name)},
        format="multipart",
    )

    refused(with_model, name)
    refused(alone, name)
    assert kept() == before
    assert GlobalModel.objects.get().preprocessing is None
    assert Blob.objects.count() == 1
