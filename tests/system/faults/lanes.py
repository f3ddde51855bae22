"""What goes on while processes die: trainings of every kind, uploads, deletions, questions; each checks itself."""

import contextlib
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load, save

from tests.system.faults.clients import (
    BluntSite,
    Hook,
    PackagedSite,
    Patient,
    ResumingSite,
    Train,
    _good,
)
from tests.system.faults.stacks import Stack
from tests.system.sites import PASSWORD, Arrays, digest, expected, model, trained

SITES = 3
SETTLED_SECONDS = 60.0
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

    def forget(self, model_id: str) -> None:
        gone = self.server.ask("DELETE", f"/api/models/{model_id}/")
        assert gone.status_code in (200, 404), gone.text  # 404: it was deleted, unheard

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


class Row(NamedTuple):
    """An update: the round that it counts in, and the one that it answers."""

    id: str
    counted: object
    answered: object
    owner: str
    state: str
    reason: str


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
        sites: int = SITES,
        lag: float = 0.0,
        failing: frozenset[int] = frozenset(),
        seconds: float | None = None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(stack, name, stop)
        self.folder = folder
        self.rounds, self.method, self.uncertainty = rounds, method, uncertainty
        self.options = {"failure_policy": "wait", **options}
        if seconds is not None:  # deadlines that pass all the time; a test would not wait past them
            self.options |= {"round_deadline": seconds, "skip_model_tests": True}
        self.hook, self.lag, self.failing, self.seed = hook, lag, failing, SEED
        self.start = model(500, seed=len(name))
        self.train: Train = trained
        self.sites: list[Account] = []
        for number in range(sites):
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
            wanted = self.wanted()
            assert wanted is None or result.final == digest(wanted)
        assert result == self.reference, f"{training}: {result} instead of {self.reference}"
        self._check_counts(training, sites)
        self.turns += 1

    def wanted(self) -> Arrays | None:
        """What NumPy says the training ends in, where it can."""
        if self.method != "FedAvg":
            return None
        return expected(self.start, len(self.sites), self.rounds)

    def model(self) -> str:
        return self.upload(f"{self.name}-model-{self.turns}", save(self.start))

    def _begin(self) -> tuple[str, str]:
        training, model_id = self._create(self.model(), f"{self.name}-{self.turns}")
        self._start(training)
        return training, model_id

    def _create(self, start: str, name: str) -> tuple[str, str]:
        wanted = {
            "model_id": start,
            "target_num_updates": self.rounds,
            "metric_names": ["loss"],
            "aggregation_method": self.method,
            "uncertainty_method": self.uncertainty,
            "options": self.options,
            "clients": [site.id for site in self.sites],
        }
        key = {"Idempotency-Key": name}
        made = _good(self.server.ask("POST", "/api/trainings/", json=wanted, headers=key)).json()
        training, model_id = made["training_id"], made["model_id"]
        seed = "UPDATE fl_server_core_training SET seed = %s WHERE id = %s"
        self.stack.rows(seed, self.seed, self._key(training))
        return training, model_id

    def _start(self, training: str) -> None:
        started = self.server.ask("POST", f"/api/trainings/{training}/start/")
        assert started.status_code in (202, 409), started.text  # 409: it had started, unheard

    def _key(self, pk: str) -> str:
        return pk if "postgres" in self.stack.targets else uuid.UUID(pk).hex

    def cast(self) -> list[Any]:
        """Who takes part, in the order of `sites`."""
        base, token = self.stack.base, [site.token for site in self.sites]
        slow = {"train": self.train, "lag": self.lag}
        return [
            PackagedSite(base, token[0], 0, self.stop, self.folder / self.name, train=self.train),
            ResumingSite(base, token[1], 1, self.stop, train=self.train, failing=self.failing),
            BluntSite(base, token[2], 2, self.stop, **slow),
        ]

    def _work(self, training: str) -> list[Any]:
        sites = self.cast()
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
        for site in sites:
            assert not getattr(site, "failures", []), site.failures
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
        """Every acknowledged update is there, and was counted by exactly one version, or refused for a reason."""
        key = self._key(training)
        end = time.monotonic() + SETTLED_SECONDS
        while (rows := self._updates(key)) and any(row.state == "received" for row in rows):
            assert time.monotonic() < end, f"{training}: an update waits for ever: {rows}"
            time.sleep(0.2)
        once = Counter((row.counted, row.owner) for row in rows)
        assert set(once.values()) == {1}, f"{training}: somebody counted twice: {once}"
        used = [row for row in rows if row.state == "consumed"]
        assert len(used) == self.updates, f"{training}: {len(used)} updates"
        left = [row for row in rows if row.state != "consumed"]
        assert all(row.state == "refused" and row.reason for row in left), left
        assert self.late or not left, left
        answered = {row.id: row.answered for row in rows}
        for site in sites:
            for number, update in site.acknowledged:
                assert answered.get(_same(update)) == number, f"{update} of {number} is lost"
        self._check_versions(key)

    def _updates(self, key: str) -> list[Row]:
        found = self.stack.rows(
            "SELECT u.id, r.number, COALESCE(t.number, r.number), u.owner_id, u.state, u.reason "
            "FROM fl_server_core_localmodel u JOIN fl_server_core_round r ON r.id = u.round_id "
            "LEFT JOIN fl_server_core_round t ON t.id = u.trained_in_id WHERE u.training_id = %s",
            key,
        )
        return [
            Row(_same(pk), counted, answered, _same(owner), str(state), str(reason))
            for pk, counted, answered, owner, state, reason in found
        ]

    def _check_versions(self, key: str) -> None:
        versions = self.stack.rows(
            "SELECT v.number, v.num_updates FROM fl_server_core_modelversion v JOIN "
            "fl_server_core_training t ON t.model_id = v.model_id WHERE t.id = %s AND v.number > 0",
            key,
        )
        assert len({number for number, _ in versions}) == len(versions), versions
        assert {n for _, n in versions} == self.per_version, versions

    late = False  # whether updates may come too late for every round

    @property
    def updates(self) -> int:
        return self.rounds_run * len(self.sites)

    @property
    def per_version(self) -> set[int]:
        return {len(self.sites)}

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
