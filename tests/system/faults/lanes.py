"""What goes on while processes die: trainings of every kind, uploads, deletions, questions; each checks itself."""

import contextlib
import io
import threading
import uuid
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load, save
from torch import nn

from tests.system.faults.clients import BluntSite, Hook, PackagedSite, Patient, ResumingSite, _good
from tests.system.faults.stacks import Stack
from tests.system.questions import INPUT
from tests.system.sites import PASSWORD, Arrays, digest, expected, model

SITES = 3
SEED = 20_260_101  # of every training: chains are drawn from it


@dataclass
class Account:
    id: str
    token: str


def account(base: str, stop: threading.Event, name: str, **fields: Any) -> Account:
    body = {"username": name, "password": PASSWORD, **fields}
    key = {"Idempotency-Key": f"account-{name}"}
    with contextlib.closing(Patient(base, "", stop)) as server:
        made = _good(server.ask("POST", "/api/users/", json=body, headers=key)).json()
    return Account(made["id"], made["token"])


class Lane:
    """Something that is repeated until the faults are over. `turn` raises if anything is not as it was."""

    def __init__(self, stack: Stack, name: str, stop: threading.Event) -> None:
        self.stack, self.name, self.stop = stack, name, stop
        self.turns = 0
        self.error: BaseException | None = None
        self.actor = account(stack.base, stop, f"{name}-actor", actor=True)
        self.server = Patient(stack.base, self.actor.token, stop)

    def turn(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """What must hold at the end, when nothing is killed any more."""

    def close(self) -> None:
        self.server.close()

    def upload(self, key: str, content: bytes) -> str:
        return str(
            _good(
                self.server.ask(
                    "POST",
                    "/api/models/",
                    data={"name": key, "description": "for a test"},
                    files={"model_file": content},
                    headers={"Idempotency-Key": key},
                )
            ).json()["model_id"]
        )


@dataclass
class Result:
    """What must be the same in every training of a lane."""

    final: str
    moments: tuple[str, ...] = ()
    means: tuple[Any, ...] = field(default=())


class Trainings(Lane):
    """One training after the other, with the same sites: each ends as the first one did."""

    def __init__(
        self,
        stack: Stack,
        name: str,
        stop: threading.Event,
        folder: Path,
        *,
        rounds: int,
        method: str = "FedAvg",
        uncertainty: str = "NONE",
        hook: Hook | None = None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(stack, name, stop)
        self.folder = folder
        self.rounds, self.method, self.uncertainty = rounds, method, uncertainty
        self.options, self.hook = options, hook
        self.start = model(500, seed=len(name))
        self.sites: list[Account] = []
        for number in range(SITES):
            told = {"message_endpoint": hook.url} if hook and number == 1 else {}
            self.sites.append(
                account(stack.base, stop, f"{name}-site-{number}", client=True, **told)
            )
        self.reference: Result | None = None

    def turn(self) -> None:
        training, model_id = self._begin()
        sites = self._work(training)
        result = self._result(training, model_id)
        if self.reference is None:
            self.reference = result
            if self.method == "FedAvg":
                assert result.final == digest(expected(self.start, SITES, self.rounds))
        assert result == self.reference, f"{training}: {result} instead of {self.reference}"
        self._check_counts(training, sites)
        self.turns += 1

    def _begin(self) -> tuple[str, str]:
        start = self.upload(f"{self.name}-model-{self.turns}", save(self.start))
        wanted = {
            "model_id": start,
            "target_num_updates": self.rounds,
            "metric_names": ["loss"],
            "aggregation_method": self.method,
            "uncertainty_method": self.uncertainty,
            "options": self.options,
            "clients": [site.id for site in self.sites],
        }
        key = {"Idempotency-Key": f"{self.name}-{self.turns}"}
        made = _good(self.server.ask("POST", "/api/trainings/", json=wanted, headers=key)).json()
        training, model_id = made["training_id"], made["model_id"]
        seed = "UPDATE fl_server_core_training SET seed = %s WHERE id = %s"
        self.stack.rows(seed, SEED, self._key(training))
        started = self.server.ask("POST", f"/api/trainings/{training}/start/")
        assert started.status_code in (202, 409), started.text  # 409: it had started, unheard
        return training, model_id

    def _key(self, pk: str) -> str:
        return pk if "postgres" in self.stack.targets else uuid.UUID(pk).hex

    def _work(self, training: str) -> list[Any]:
        base = self.stack.base
        sites: list[Any] = [
            PackagedSite(base, self.sites[0].token, 0, self.stop, self.folder / self.name),
            ResumingSite(base, self.sites[1].token, 1, self.stop),
            BluntSite(base, self.sites[2].token, 2, self.stop),
        ]
        errors: list[BaseException] = []

        def run(site: Any) -> None:
            try:
                site.run()
            except BaseException as error:  # noqa: BLE001 - told by the lane's own thread
                errors.append(error)

        threads = [threading.Thread(target=run, args=(site,), daemon=True) for site in sites]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise AssertionError(f"{self.name}: {errors[0]!r}; {self._situation(training)}")
        assert not sites[0].failures, sites[0].failures
        return sites

    def _situation(self, training: str) -> str:
        found = _good(self.server.ask("GET", f"/api/trainings/{training}/")).json()
        return f"training {training}: {found['state']} round {found['round']} {found['reason']}"

    def _result(self, training: str, model_id: str) -> Result:
        said = _good(self.server.ask("GET", f"/api/trainings/{training}/")).json()
        assert said["state"] == "C", self._situation(training)
        final = load(_good(self.server.ask("GET", f"/api/models/{model_id}/")).content)
        moments: tuple[str, ...] = ()
        if self.uncertainty == "SWAG":
            url = f"/api/models/{model_id}/swag/"
            answers = [
                self.server.ask("GET", url, params={"moment": m}) for m in ("first", "second")
            ]
            moments = tuple(digest(load(_good(answer).content)) for answer in answers)
        metrics = _good(self.server.ask("GET", f"/api/models/{model_id}/metrics/")).json()
        means = [(m["step"], m["key"], m["value_float"]) for m in metrics if m["reporter"] is None]
        return Result(digest(final), moments, tuple(sorted(means)))

    def _check_counts(self, training: str, sites: list[Any]) -> None:
        """Every acknowledged update is there, and was counted by exactly one version."""
        key = self._key(training)
        rows = self.stack.rows(
            "SELECT u.id, r.number, u.owner_id, u.state FROM fl_server_core_localmodel u "
            "JOIN fl_server_core_round r ON r.id = u.round_id WHERE u.training_id = %s",
            key,
        )
        by_id = {_same(pk): int(number) for pk, number, _, _ in rows}  # type: ignore[call-overload]
        once = Counter((number, _same(owner)) for _, number, owner, _ in rows)
        assert set(once.values()) == {1}, f"{training}: somebody counted twice: {once}"
        assert len(rows) == self.rounds_run * SITES, f"{training}: {len(rows)} updates"
        assert {state for *_, state in rows} == {"consumed"}, rows
        for site in sites:
            for number, update in site.acknowledged:
                assert by_id.get(_same(update)) == number, f"{update} of round {number} is lost"
        versions = self.stack.rows(
            "SELECT v.number, v.num_updates FROM fl_server_core_modelversion v JOIN "
            "fl_server_core_training t ON t.model_id = v.model_id WHERE t.id = %s AND v.number > 0",
            key,
        )
        assert len({number for number, _ in versions}) == len(versions), versions
        counted = {n for _, n in versions}
        assert counted == {SITES}, f"{training}: versions of {counted} updates"

    @property
    def rounds_run(self) -> int:
        return self.rounds * max(1, int(self.options.get("daisy_chain_period", 0)))

    def check(self) -> None:
        if self.hook is None:
            return
        rows = self.stack.rows("SELECT delivery_id, state FROM fl_server_core_notification")
        heard = {_same(pk) for pk in self.hook.seen}
        lost = [pk for pk, state in rows if state == "delivered" and _same(pk) not in heard]
        assert not lost, f"marked as delivered, but never heard: {lost}"


def _same(pk: object) -> str:
    return uuid.UUID(str(pk)).hex if not str(pk).isdecimal() else str(pk)


class Uploads(Lane):
    """Models that come and go: every key makes one model, and every file goes with its model."""

    def turn(self) -> None:
        key = f"{self.name}-{self.turns}"
        content = save(model(200, seed=self.turns))
        made = self.upload(key, content)
        assert self.upload(key, content) == made
        assert _good(self.server.ask("GET", f"/api/models/{made}/")).content == content
        gone = self.server.ask("DELETE", f"/api/models/{made}/")
        assert gone.status_code in (200, 404), gone.text  # 404: it was deleted, unheard
        self.turns += 1

    def check(self) -> None:
        left = _good(self.server.ask("GET", "/api/models/")).json()
        assert left == [], f"models that nobody asked for: {left}"


class Questions(Lane):
    """One question after the other to a model whose answer torch knows."""

    def __init__(self, stack: Stack, name: str, stop: threading.Event) -> None:
        super().__init__(stack, name, stop)
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        file = io.BytesIO()
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(network), file)
        self.model = self.upload(f"{name}-model", file.getvalue())
        self.wanted = network(torch.tensor(INPUT)).argmax(1).tolist()

    def turn(self) -> None:
        question = {"model_id": self.model, "model_input": INPUT}
        answer = self.server.ask("POST", "/api/inference/", json=question)
        while answer.status_code == 202:
            self.stop.wait(0.2)
            answer = self.server.ask("GET", answer.json()["url"])
        assert _good(answer).json()["inference"] == self.wanted
        self.turns += 1


def lanes(stack: Stack, stop: threading.Event, folder: Path, hook: Hook) -> list[Lane]:
    return [
        Trainings(stack, "fedavg", stop, folder, rounds=3, hook=hook, options={}),
        Trainings(
            stack, "swag", stop, folder, rounds=2, uncertainty="SWAG",
            options={"swag_rounds": 1, "skip_model_tests": True},
        ),
        Trainings(
            stack, "feddc", stop, folder, rounds=1, method="FedDC",
            options={"daisy_chain_period": 3, "skip_model_tests": True},
        ),
        Uploads(stack, "uploads", stop),
        Questions(stack, "questions", stop),
    ]  # fmt: skip


__all__ = ["Arrays", "Lane", "Trainings", "lanes"]
