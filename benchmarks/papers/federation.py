"""A real server with sites that ask, download, train and upload over HTTP; the server decides everything else."""

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

import fl_client
from demo.processes import Federation as Processes
from fl_client.journal import Journal
from fl_client.transport import Transport
from fl_client.work import Worker

PATIENCE = 600.0  # seconds for a step of the server; a busy machine takes its time
LOOK = 0.02  # seconds between two looks at a training
AT_A_TIME = 4  # sites of a round that train and talk at the same time


class Broken(Exception):
    """A training did not go as it has to."""


class Site:
    """One account, which outlives its trainings."""

    def __init__(self, url: str, user: dict[str, Any], folder: Path) -> None:
        self.id = str(user["id"])
        self._transport = Transport(url, token=user["token"])
        self._journal = Journal(folder)

    def work(self, client: fl_client.Client) -> None:
        """Ask for a task, and do it."""
        answer = self._transport.json("GET", "tasks/", params={"wait": 25})
        if answer["state"] != "task":
            raise Broken(f"a site that the server has drawn is told: {answer}")
        ended = Worker(client, self._transport, self._journal, "text").work(answer["task"])
        if ended != "uploaded":
            raise Broken(f"a task of round {answer['task']['round']} ended with {ended!r}")

    def close(self) -> None:
        self._transport.close()


class Federation:
    """`manage.py serve` on an empty folder, someone who owns trainings, and sites; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = Processes(folder)
        self._sites: list[Site] = []

    def __enter__(self) -> "Federation":
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the sites are threads of one process
        try:
            self._processes.serve(secrets.token_urlsafe(12), PATIENCE)
        except BaseException:
            self._processes.__exit__()
            raise
        owner = self._account("owner", actor=True)
        self._fl = fl_client.connect(self._processes.url, token=owner["token"])
        return self

    def __exit__(self, *_: object) -> None:
        for site in self._sites:
            site.close()
        self._fl.close()
        self._processes.__exit__()
        torch.set_num_threads(self._threads)

    def cpu(self) -> float:
        """Seconds of the processor so far: this process, the server and its children."""
        server = self._processes.server
        assert server is not None
        root = psutil.Process(server.pid)
        spent = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return time.process_time() + sum(times.user + times.system for times in spent)

    def _account(self, name: str, **role: bool) -> dict[str, Any]:
        with fl_client.connect(self._processes.url) as anybody:
            return anybody.users.register(name, secrets.token_urlsafe(16), **role)

    def sites(self, count: int) -> list[Site]:
        """The first `count` sites; accounts that are missing are made."""

        def made(number: int) -> Site:
            user = self._account(f"site-{number:03}", client=True)
            return Site(self._processes.url, user, self._folder / f"site-{number:03}")

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            self._sites += pool.map(made, range(len(self._sites), count))
        return self._sites[:count]

    def train(
        self,
        *,
        start: Mapping[str, Tensor],
        clients: Sequence[fl_client.Client],
        rounds: int,
        method: str = "FedAvg",
        options: Mapping[str, Any] | None = None,
        at_a_time: int = AT_A_TIME,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the global model after each round; what is left of the training when its taker stops is cancelled.

        Client k trains at site k. In each round those whom the server asks work in the order of their
        numbers, `at_a_time` of them side by side.
        """
        sites = self.sites(len(clients))
        who = {site.id: (site, client) for site, client in zip(sites, clients, strict=True)}
        file = self._folder / "start.safetensors"
        save_file(dict(start), file)
        training = self._fl.trainings.create(
            model=self._fl.models.upload(name=method, description=method, weights=file),
            rounds=rounds,
            clients=list(who),
            aggregation_method=method,
            options={"skip_model_tests": True, "failure_policy": "fail", **(options or {})},
        )
        training.start()
        model = training.model
        try:
            with ThreadPoolExecutor(at_a_time) as pool:
                for number in range(rounds):
                    asked = self._asked(training, number)
                    turns = [pair for name, pair in who.items() if name in asked]
                    list(pool.map(lambda pair: pair[0].work(pair[1]), turns))
                    self._until(training, number + 1)
                    weights = self._fl.models.weights(model)
                    yield {name: torch.from_numpy(value) for name, value in weights.items()}
        finally:
            with contextlib.suppress(fl_client.Conflict):  # it has ended by itself
                training.cancel()

    def _asked(self, training: fl_client.Training, number: int) -> set[str]:
        """Whom the server has asked for an update of this round, once it is open."""
        url = f"trainings/{training.id}/rounds/?page_size=1&page={number + 1}"
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            try:
                row = self._fl.transport.json("GET", url)["results"][0]
            except fl_client.NotFound:
                time.sleep(LOOK)
                continue
            return {part["user"] for part in row["participation"] if part["kind"] == "train"}
        raise Broken(f"round {number} did not begin: {training.get()['reason']}")

    def _until(self, training: fl_client.Training, number: int) -> None:
        give_up = time.monotonic() + PATIENCE
        while (now := training.get())["round"] < number:
            if now["state"] not in {"O", "C"} or time.monotonic() > give_up:
                raise Broken(f"round {number - 1} did not end: {now['state']} {now['reason']}")
            time.sleep(LOOK)
