"""One malformed update, and the stage that all of them are sent to."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone
from rest_framework.test import APIClient
from safetensors.numpy import save

from fl_server_ai.services.models import model_upload
from fl_server_ai.services.tasks import task_failure
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_core.models import Participant, User
from fl_server_core.services.tokens import token_issue
from tests.scenes import Arrays, Scene, person, scene, staged, weights

TUS = {"HTTP_TUS_RESUMABLE": "1.0.0"}
ROUTE = "/api/models/{model}/"


class Stage:
    """Trainings at round 0 with the sites ada and grace, by name; `main` is FedAvg.

    Everything is made when it is first asked for, and nothing that a case sends may change it.
    """

    def __init__(self) -> None:
        self.main = scene("ada", "grace", skip_model_tests=True)
        self._clients: dict[str, APIClient] = {}
        self._scenes: dict[str, Scene] = {"main": self.main}

    def user(self, name: str) -> User:
        return User.objects.get(username=name)

    def client(self, name: str = "ada") -> APIClient:
        """Logged in as this user; of nobody for an empty name."""
        if name not in self._clients:
            client = APIClient(raise_request_exception=False)
            if name:
                client.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=self.user(name))}")
            self._clients[name] = client
        return self._clients[name]

    def scene(self, name: str) -> Scene:
        """`main`, one that `MADE` says how to make, or one of the strategy of this name."""
        if name not in self._scenes:
            made = MADE.get(name)
            self._scenes[name] = made(self) if made else self.another(name)
        return self._scenes[name]

    def another(
        self, method: str = "FedAvg", start: Arrays | None = None, on: bool = True, **options: Any
    ) -> Scene:
        """One more training of the same people."""
        main = self.main
        data = save(weights(0.0) if start is None else start)
        model = model_upload(
            owner=main.actor, name=method, description="", model_file=staged(data), sha256=None
        )
        training = training_create(
            actor=main.actor,
            model=model,
            target_num_updates=2,
            aggregation_method=method,
            options={"skip_model_tests": True, **options},
            clients=[user.pk for user in main.sites.values()],
        )
        if on:
            training_start(training=training, user=main.actor)
            training.refresh_from_db()
        return Scene(main.actor, main.sites, model, training)

    def path(self, name: str = "main") -> str:
        return ROUTE.format(model=self.scene(name).training.model_id)

    def result(self, name: str = "main") -> str:
        return f"/api/tasks/{self.scene(name).task('ada').pk}/result/"

    def upload(self, data: bytes, *, cut: int = 0, who: str = "ada") -> str:
        """The id of a resumable upload of `data`, without its last `cut` bytes."""
        told = base64.b64encode(hashlib.sha256(data).hexdigest().encode()).decode()
        client = self.client(who)
        made = client.post(
            "/api/uploads/",
            HTTP_UPLOAD_LENGTH=str(len(data)),
            HTTP_UPLOAD_METADATA=f"sha256 {told}",
            **TUS,
        )
        client.generic(
            "PATCH",
            made["Location"],
            data[: len(data) - cut],
            "application/offset+octet-stream",
            HTTP_UPLOAD_OFFSET="0",
            **TUS,
        )
        return str(made.json()["id"])

    @cached_property
    def waiting(self) -> str:
        """A finished upload of an honest file."""
        return self.upload(HONEST)


def _failed(stage: Stage) -> Scene:
    made = stage.another()
    task_failure(task=made.task("ada"), user=stage.user("ada"), code="BROKEN", text="no data")
    return made


def _sent(stage: Stage) -> Scene:
    made = stage.another()
    made.send("ada", 3.0)
    return made


def _joined(stage: Stage) -> Scene:
    made = stage.another()
    late, gone = person("late", client=True), person("gone", client=True)
    Participant.objects.create(training=made.training, user=late)
    Participant.objects.create(training=made.training, user=gone, removed_at=timezone.now())
    return made


def _outsiders(stage: Stage) -> Scene:
    person("eve", client=True)
    return stage.main


def _spare(stage: Stage) -> Scene:
    """A model that no training uses."""
    main = stage.main
    model = model_upload(
        owner=main.actor, name="spare", description="", model_file=staged(HONEST), sha256=None
    )
    return Scene(main.actor, main.sites, model, main.training)


MADE: dict[str, Callable[[Stage], Scene]] = {
    "outsiders": _outsiders,
    "spare": _spare,
    "not started": lambda stage: stage.another(on=False),
    "failed": _failed,
    "sent": _sent,
    "joined": _joined,
    "huge": lambda stage: stage.another(
        start={**weights(0.0), "layer.bias": np.full(3, 3.4e38, np.float32)}
    ),
    "chain": lambda stage: stage.another(daisy_chain_period=2),
    "no bias": lambda stage: stage.another(exclude=["*.bias"]),
}

HONEST = save(weights(1.0))


def file(data: bytes) -> SimpleUploadedFile:
    return SimpleUploadedFile("weights", data)


Send = Callable[[Stage, str], Any]  # to the training of this name


def by_model(stage: Stage, to: str, data: bytes, told: Mapping[str, Any]) -> Any:
    body = {"round": 0, "sample_size": 2, **told, "model_file": file(data)}
    return stage.client().post(stage.path(to), body, format="multipart")


def by_result(stage: Stage, to: str, data: bytes, told: Mapping[str, Any]) -> Any:
    body = {"meta": json.dumps({"num_examples": 2, **told}), "model_file": file(data)}
    return stage.client().post(stage.result(to), body, format="multipart")


def by_upload(stage: Stage, to: str, data: bytes, told: Mapping[str, Any]) -> Any:
    body = {"round": 0, "sample_size": 2, **told, "upload": stage.upload(data)}
    return stage.client().post(stage.path(to), body, format="multipart")


@dataclass(frozen=True)
class Case:
    """`say` is what the answer must name; each of `sends` is a way in by which it is tried."""

    name: str
    status: int
    code: str
    say: tuple[str, ...]
    sends: tuple[Send, ...] = field(repr=False)
    to: str = "main"
    settings: Mapping[str, Any] = field(default_factory=dict)


def case(
    name: str, status: int, code: str, say: str, *sends: Send, to: str = "main", **settings: Any
) -> Case:
    """A line of the table; what the answer must name is separated by bars."""
    return Case(name, status, code, tuple(filter(None, say.split("|"))), sends, to, settings)


def _as_files(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_files(one) for one in value]
    return file(value) if isinstance(value, bytes) else value


def form(who: str = "ada", **changes: Any) -> Send:
    """An honest form sent to the model, with these fields changed; None leaves one out, bytes are a file."""

    def send(stage: Stage, to: str) -> Any:
        body = {"round": 0, "sample_size": 2, "model_file": file(HONEST), **changes}
        body = {key: _as_files(value) for key, value in body.items() if value is not None}
        return stage.client(who).post(stage.path(to), body, format="multipart")

    return send


def meta(text: str | None = None, **changes: Any) -> Send:
    """An honest result of a task whose meta is `text`, or has these keys changed."""

    def send(stage: Stage, to: str) -> Any:
        told = {"num_examples": 2, **changes}
        kept = {key: value for key, value in told.items() if value is not None}
        body = {"meta": json.dumps(kept) if text is None else text, "model_file": file(HONEST)}
        return stage.client().post(stage.result(to), body, format="multipart")

    return send


def sent(build: Callable[[], bytes], **told: Any) -> tuple[Send, ...]:
    """This file to the model, as a task's result, and as a resumable upload."""
    data = cache(build)
    return tuple(
        lambda stage, to, door=door: door(stage, to, data(), told)
        for door in (by_model, by_result, by_upload)
    )
