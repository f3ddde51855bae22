"""Twenty "last" updates at once: one closes the round, and only one aggregation follows."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.client import encode_multipart
from rest_framework.test import APIClient
from safetensors.numpy import save

from fl_server_ai.services.updates import Receipt, update_submit
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.models import GlobalModel, LocalModel, ModelVersion, TrainerEvent
from fl_server_core.services.tokens import token_issue
from tests.scenes import Scene, person, scene, staged, weights

pytestmark = [pytest.mark.system, pytest.mark.django_db(transaction=True)]
SITES = [f"site-{number:02}" for number in range(20)]


def at_once(jobs: list[str], running: Scene, copies: int = 1) -> list[Receipt]:
    """Send every site's update (`copies` times each) from threads that start together."""
    start = threading.Barrier(len(jobs) * copies)

    def send(site: str) -> Receipt:
        try:
            file = staged(save(weights(float(SITES.index(site)))))
            start.wait()
            return update_submit(
                model_id=running.training.model_id,
                owner=running.sites[site],
                round=0,
                sample_size=1,
                file=file,
                sha256=None,
                metrics={},
            )
        finally:
            connection.close()

    with ThreadPoolExecutor(len(jobs) * copies) as pool:
        return list(pool.map(send, jobs * copies))


def test_twenty_last_updates_make_one_aggregation_and_one_version() -> None:
    running = scene(*SITES, rounds=3, skip_model_tests=True)

    receipts = at_once(SITES, running)
    event = TrainerEvent.objects.get()
    process_trainer_task(event.pk)

    assert sorted(receipt.received for receipt in receipts) == list(range(1, 21))
    assert LocalModel.objects.count() == 20
    assert ModelVersion.objects.filter(model=running.training.model).count() == 2
    assert running.current()["layer.bias"].tolist() == [9.5] * 3


def test_the_same_update_sent_five_times_at_once_is_stored_once() -> None:
    running = scene(*SITES[:4], rounds=3, skip_model_tests=True)

    receipts = at_once(SITES[:4], running, copies=5)

    assert sum(receipt.created for receipt in receipts) == 4
    assert LocalModel.objects.count() == 4
    assert TrainerEvent.objects.count() == 1


def test_five_workers_that_get_the_same_hint_publish_once() -> None:
    running = scene(*SITES[:2], rounds=3, skip_model_tests=True)
    at_once(SITES[:2], running)
    event = TrainerEvent.objects.get()
    start = threading.Barrier(5)

    def work(_: int) -> None:
        try:
            start.wait()
            process_trainer_task(event.pk)
        finally:
            connection.close()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, range(5)))

    event.refresh_from_db()
    assert (event.state, event.attempt) == ("done", 1)
    assert ModelVersion.objects.filter(model=running.training.model).count() == 2
    assert running.now.model.round == 1


class Together(io.BytesIO):
    """A request's body that comes when those of all others come."""

    def __init__(self, data: bytes, start: threading.Barrier) -> None:
        super().__init__(data)
        self._start = start

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() == 0:
            self._start.wait(30)
        return super().read(size)


def test_models_that_are_sent_at_once_share_their_owners_quota(settings) -> None:
    settings.FL_USER_BYTES = 1500
    data = save({"w": np.zeros(250, np.float32)})
    key = token_issue(user=person("actor", actor=True))
    start = threading.Barrier(4)

    def send(number: int) -> int:
        file = SimpleUploadedFile("w", data)
        form = encode_multipart("B", {"name": "m", "description": "d", "model_file": file})
        try:
            return (
                APIClient(HTTP_AUTHORIZATION=f"Token {key}")
                .generic(
                    "POST", "/api/models/", form, "multipart/form-data; boundary=B",
                    HTTP_IDEMPOTENCY_KEY=str(number), **{"wsgi.input": Together(form, start)},
                )
                .status_code
            )  # fmt: skip
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(send, range(4)))

    assert sorted(statuses) == [201, 409, 409, 409]
    assert GlobalModel.objects.count() == 1
