"""People and sites that speak plain HTTP, and the arithmetic that their training must end in."""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray]
PASSWORD = "a long enough passphrase"  # of throw-away accounts


def model(size: int, seed: int = 7) -> Arrays:
    """A float32 vector of `size`, and a small matrix."""
    draw = np.random.default_rng(seed)
    return {
        "body": draw.standard_normal(size, np.float32),
        "head": draw.standard_normal((3, 2), np.float32),
    }


def trained(weights: Mapping[str, np.ndarray], site: int, round: int) -> Arrays:
    """What site number `site` (from 0) makes of the weights in a round."""
    step = np.float32((site + 1) / 8 + round / 4)
    return {name: array + step for name, array in weights.items()}


def samples(site: int) -> int:
    return 10 * (site + 1) + 3


def expected(weights: Arrays, sites: int, rounds: int) -> Arrays:
    """FedAvg by NumPy: exact sums in float64, one division, one rounding to float32."""
    total = sum(samples(site) for site in range(sites))
    for round in range(rounds):
        sums = {name: np.zeros(array.shape) for name, array in weights.items()}
        for site in range(sites):
            for name, array in trained(weights, site, round).items():
                sums[name] += samples(site) * array.astype(np.float64)
        weights = {name: (array / total).astype(np.float32) for name, array in sums.items()}
    return weights


def digest(weights: Arrays) -> str:
    return hashlib.sha256(save(weights)).hexdigest()


def http(base: str, token: str = "", verify: Any = True) -> httpx.Client:
    headers = {"Authorization": f"Token {token}"} if token else {}
    return httpx.Client(base_url=base, headers=headers, verify=verify, timeout=60, trust_env=False)


def checked(response: httpx.Response, status: int) -> Any:
    """The JSON of an answer that must have this status."""
    assert response.status_code == status, f"{response.request.url}: {response.text[:2000]}"
    return response.json()


def register(base: str, name: str, verify: Any = True, **fields: Any) -> tuple[str, str]:
    """Make an account through open registration; its id and token."""
    with http(base, verify=verify) as anonymous:
        body = {"username": name, "password": PASSWORD, **fields}
        user = checked(anonymous.post("/api/users/", json=body), 201)
    return user["id"], user["token"]


@dataclass
class Site:
    """One participant: a thread that works off tasks, and waits for a server that is away."""

    base: str
    token: str
    number: int
    verify: Any = True
    before_upload: Callable[[int, int], None] = lambda site, round: None
    rounds: list[int] = field(default_factory=list)
    final: dict[str, Any] | None = None
    error: BaseException | None = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, daemon=True, name=f"site-{self.number}")
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            with http(self.base, self.token, self.verify) as server:
                while self.final is None:
                    self._step(server)
        except BaseException as error:
            self.error = error
            raise

    def _step(self, server: httpx.Client) -> None:
        try:
            answer = checked(server.get("/api/tasks/", params={"wait": 25}), 200)
            if answer["state"] == "done":
                self.final = answer
            elif answer["state"] == "task":
                self._work(server, answer["task"])
        except httpx.TransportError:  # the server was killed: ask again until it is back
            time.sleep(0.1)

    def _work(self, server: httpx.Client, task: dict[str, Any]) -> None:
        if task["kind"] == "evaluate":
            metrics = {"metric_names": ["loss"], "metric_values": ["0.5"]}
            checked(server.post(task["upload_url"], data=metrics), 201)
            return
        content = server.get(task["model"]["url"]).raise_for_status().content
        assert hashlib.sha256(content).hexdigest() == task["model"]["sha256"]
        result = save(trained(load(content), self.number, task["round"]))
        self.before_upload(self.number, task["round"])
        form = {"round": str(task["round"]), "sample_size": str(samples(self.number))}
        files = {"model_file": ("update.safetensors", result)}
        response = server.post(task["upload_url"], data=form, files=files)
        assert response.status_code in (200, 201), response.text
        self.rounds.append(task["round"])


@dataclass
class Cohort:
    """A researcher and some sites on one server, and the training that they share."""

    base: str
    token: str
    verify: Any
    sites: list[Site]
    training: str = ""
    model: str = ""

    @classmethod
    def gather(
        cls,
        base: str,
        weights: Arrays,
        *,
        sites: int = 3,
        rounds: int = 3,
        verify: Any = True,
        prefix: str = "",
        **options: Any,
    ) -> "Cohort":
        """Make the accounts, upload the model, create the training and start it."""
        _, token = register(base, f"{prefix}researcher", verify, actor=True)
        people = [register(base, f"{prefix}site-{n}", verify, client=True) for n in range(sites)]
        members = [Site(base, key, n, verify) for n, (_, key) in enumerate(people)]
        cohort = cls(base, token, verify, members)
        form = {"name": "vector", "description": "for a test"}
        files = {"model_file": ("model.safetensors", save(weights))}
        uploaded = cohort._ask("POST", "models/", 201, data=form, files=files).json()
        wanted = {
            "model_id": uploaded["model_id"],
            "target_num_updates": rounds,
            "metric_names": ["loss"],
            "aggregation_method": "FedAvg",
            "options": options,
            "clients": [pk for pk, _ in people],
        }
        created = cohort._ask("POST", "trainings/", 201, json=wanted).json()
        cohort.model, cohort.training = uploaded["model_id"], created["training_id"]
        cohort._ask("POST", f"trainings/{cohort.training}/start/", 202)
        return cohort

    def run(self, seconds: float = 240.0) -> None:
        """Let every site work until the training has ended."""
        threads = [site.start() for site in self.sites]
        end = time.monotonic() + seconds
        for thread, site in zip(threads, self.sites, strict=True):
            thread.join(max(0.0, end - time.monotonic()))
            if site.error is not None:
                raise site.error
            assert site.final is not None, f"site {site.number} is still waiting"

    @property
    def state(self) -> str:
        """The one-letter state of the training."""
        return str(self._ask("GET", f"trainings/{self.training}/", 200).json()["state"])

    @property
    def reason(self) -> str:
        """Why the training has failed."""
        return str(self._ask("GET", f"trainings/{self.training}/", 200).json()["reason"])

    def weights(self) -> Arrays:
        """The current global model."""
        return load(self._ask("GET", f"models/{self.model}/", 200).content)

    def _ask(self, method: str, path: str, status: int, **content: Any) -> httpx.Response:
        with http(self.base, self.token, self.verify) as actor:
            response = actor.request(method, f"/api/{path}", **content)
        assert response.status_code == status, f"{path}: {response.text[:2000]}"
        return response
