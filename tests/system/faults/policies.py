"""Lanes of trainings whose rounds are not plain: extras, buffers, late updates, skipped rounds, joining in."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load, save

import fl_client
from fl_server_core.services.sampling import sample_draw
from tests.system.faults.clients import PackagedSite, Site, _good
from tests.system.faults.lanes import Trainings
from tests.system.sites import Arrays, samples, trained

STEP = np.float32(0.125)
SHARE = 0.5  # of the participants, on average, in a skipping lane's round
CONTROL = "extra.scaffold.c."
CHANGE = "extra.scaffold.dc."


class ScaffoldSite(Site):
    """Sends the change of its control variate; one step with the learning rate 1 makes the round."""

    def work(self, task: dict[str, Any], weights: Arrays) -> Arrays:
        told = task["extras"]
        servers: Arrays = {}
        if told:
            servers = load(_good(self._server.ask("GET", told["url"])).content)
            assert set(servers) == {CONTROL + name for name in weights}, set(servers)
        made = super().work(task, weights)
        zero = np.float32(0)
        changes = {
            CHANGE + name: weights[name] - made[name] - servers.get(CONTROL + name, zero)
            for name in weights
        }
        return made | changes


class PackagedScaffold(PackagedSite):
    """The same with the package's helper, which remembers its variate between rounds."""

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        control = fl_client.Scaffold(context, weights)
        result = super().fit(weights, config, context)
        change = control.finish(weights, result.weights, lr_sum=1.0)
        return fl_client.FitResult(
            result.weights, result.num_examples, extras={"scaffold.dc": change}
        )


class Scaffold(Trainings):
    """State on the server, extras both ways."""

    def cast(self) -> list[Any]:
        base, token = self.stack.base, [site.token for site in self.sites]
        return [
            PackagedScaffold(base, token[0], 0, self.stop, self.folder / self.name),
            *(ScaffoldSite(base, token[n], n, self.stop, lag=self.lag) for n in (1, 2)),
        ]


def level(weights: Mapping[str, np.ndarray], site: int, round: int) -> Arrays:
    """The same step from everybody in every round: then it doesn't matter whose update is how late."""
    return {name: array + STEP for name, array in weights.items()}


class Buffered(Trainings):
    """A round closes with two of three updates; the third one counts in a later round, or in none."""

    late = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train = level
        self.start = {name: np.round(array) for name, array in self.start.items()}  # exact sums

    def wanted(self) -> Arrays:
        return {name: array + STEP * self.rounds for name, array in self.start.items()}

    @property
    def updates(self) -> int:
        return 2 * self.rounds

    @property
    def per_version(self) -> set[int]:
        return {2}


class Skipping(Trainings):
    """Rounds in which too few are drawn keep the model; the same ones are drawn in every training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = next(seed for seed in range(10**6) if self._suits(self._drawn(seed)))
        self.drawn = self._drawn(self.seed)

    def _drawn(self, seed: int) -> list[list[int]]:
        """The numbers of the sites in each round; none in one that is skipped."""
        ids = [site.id for site in self.sites]
        draws = [
            sample_draw("poisson", ids, seed=seed, number=number, fraction=SHARE)
            for number in range(self.rounds)
        ]
        return [[ids.index(one) for one in draw] if len(draw) > 1 else [] for draw in draws]

    def _suits(self, drawn: Sequence[Sequence[int]]) -> bool:
        return [bool(sites) for sites in drawn] == [True, False, True]

    def wanted(self) -> Arrays:
        weights = self.start
        for round, sites in enumerate(self.drawn):
            if sites:
                weights = averaged(weights, sites, round)
        return weights

    @property
    def updates(self) -> int:
        return sum(map(len, self.drawn))

    @property
    def per_version(self) -> set[int]:
        return {len(sites) for sites in self.drawn if sites}


def averaged(weights: Arrays, sites: Sequence[int], round: int) -> Arrays:
    """FedAvg of these sites by NumPy."""
    total = sum(map(samples, sites))
    return {
        name: (
            sum(
                samples(site) * trained(weights, site, round)[name].astype(np.float64)
                for site in sites
            )
            / total
        ).astype(np.float32)
        for name in weights
    }


class JoiningSite(Site):
    """Says what the training requires, and gives the weights to begin with if it is asked."""

    def __init__(
        self, base: str, token: str, number: int, stop: threading.Event, start: Arrays, edition: int
    ) -> None:
        super().__init__(base, token, number, stop)
        self._start, self._edition = start, edition

    def run(self) -> None:
        said = {"attributes": {"edition": self._edition}, "num_examples": samples(self._number)}
        _good(self._server.ask("POST", "/api/clients/me/join/", json=said))
        super().run()

    def _work(self, task: dict[str, Any]) -> None:
        if task["kind"] != "initial_weights":
            super()._work(task)
            return
        form = {"meta": '{"num_examples": 1}'}
        files = {"model_file": save(self._start)}
        answer = self._server.ask("POST", task["upload_url"], data=form, files=files)
        assert answer.status_code in (200, 201, 409), answer.text  # 409: somebody else was asked


class Joining(Trainings):
    """A training without weights, of sites that have joined in with what it requires; anew in each turn."""

    def model(self) -> str:
        name = f"{self.name}-model-{self.turns}"
        form = {"name": name, "description": "for a test", "initial_weights": "client"}
        made = self.server.ask("POST", "/api/models/", json=form, headers={"Idempotency-Key": name})
        return str(_good(made).json()["model_id"])

    def _begin(self) -> tuple[str, str]:
        self.options = {**self.options, "require": {"edition": self.turns}}
        return super()._begin()

    def cast(self) -> list[Any]:
        return [
            JoiningSite(
                self.stack.base, site.token, number, self.stop, self.start, edition=self.turns
            )
            for number, site in enumerate(self.sites)
        ]
