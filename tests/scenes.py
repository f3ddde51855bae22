"""Trainings at a given moment, made through the services that the API calls."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from fl_server_ai.services.models import model_upload
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.services.updates import Receipt, metrics_submit, update_submit
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.models import GlobalModel, Round, Task, TrainerEvent, Training, User
from fl_server_core.storage import local_path, staging_path

Arrays = dict[str, np.ndarray]


def person(name: str, **fields: Any) -> User:
    """A user without a usable password."""
    return User.objects.create(username=name, **fields)


def staged(data: bytes) -> Path:
    """Bytes as the upload handler leaves them."""
    path = staging_path(".upload")
    path.write_bytes(data)
    return path


def weights(value: float = 0.0) -> Arrays:
    """A tiny model: two float tensors of one value, and an integer counter."""
    return {
        "layer.weight": np.full((3, 2), value, np.float32),
        "layer.bias": np.full((3,), value, np.float32),
        "steps": np.array(int(value), np.int64),
    }


@dataclass
class Scene:
    """One training with its people; `sites` by name."""

    actor: User
    sites: dict[str, User]
    model: GlobalModel
    training: Training
    shared: dict[str, Any] = field(default_factory=dict)

    def send(self, site: str, value: float, samples: int = 1, round: int | None = None) -> Receipt:
        """One site's update for the current round (or another)."""
        self.training.model.refresh_from_db()
        return update_submit(
            model_id=self.training.model_id,
            owner=self.sites[site],
            round=self.training.model.round if round is None else round,
            sample_size=samples,
            file=staged(save(weights(value))),
            sha256=None,
            metrics={},
        )

    def report(self, site: str, metrics: Mapping[str, float], samples: int | None = None) -> None:
        """One site's test metrics."""
        metrics_submit(
            model_id=self.training.model_id,
            reporter=self.sites[site],
            metrics=dict(metrics),
            sample_size=samples,
        )

    def work(self) -> int:
        """Process every pending event, as a worker would; returns how many there were."""
        pending = list(TrainerEvent.objects.filter(state="pending").order_by("id"))
        for event in pending:
            process_trainer_task(event.pk)
        return len(pending)

    @property
    def now(self) -> Training:
        """The training as the database has it."""
        return Training.objects.select_related("model__current_version__blob").get(
            pk=self.training.pk
        )

    @property
    def round(self) -> Round:
        newest = Round.objects.filter(training=self.training).order_by("-number").first()
        assert newest is not None
        return newest

    def task(self, site: str, kind: str = "train") -> Task:
        return Task.objects.get(round=self.round, user=self.sites[site], kind=kind)

    def current(self) -> Arrays:
        """The current global weights."""
        with local_path(self.now.model.weights.blob) as path:
            return load(path.read_bytes())

    def digest(self) -> str:
        """SHA-256 of the current global weights as they lie on disk."""
        with local_path(self.now.model.weights.blob) as path:
            return hashlib.sha256(path.read_bytes()).hexdigest()


def scene(
    *names: str,
    rounds: int = 2,
    started: bool = True,
    method: str = "FedAvg",
    endpoint: str = "",
    uncertainty: Any = "NONE",
    uncertainty_options: dict[str, Any] | None = None,
    **options: Any,
) -> Scene:
    """A training with these sites (ada and grace by default), started unless told otherwise."""
    names = names or ("ada", "grace")
    actor = person("actor", actor=True)
    sites = {name: person(name, client=True, message_endpoint=endpoint) for name in names}
    model = model_upload(
        owner=actor,
        name="tiny",
        description="two layers",
        model_file=staged(save(weights(0.0))),
        sha256=None,
    )
    training = training_create(
        actor=actor,
        model=model,
        target_num_updates=rounds,
        aggregation_method=method,
        uncertainty_method=uncertainty,
        options=options
        if uncertainty_options is None
        else {**options, "uncertainty": uncertainty_options},
        clients=[user.pk for user in sites.values()],
    )
    if started:
        training_start(training=training, user=actor)
        training.refresh_from_db()
    return Scene(actor, sites, model, training)
