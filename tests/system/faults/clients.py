"""Deterministic sites over real HTTP: the client package, one that repeats what failed, and a blunt one."""

import base64
import contextlib
import hashlib
import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load, save

import fl_client
from tests.system.sites import Arrays, http, samples, trained

PATIENCE = 240.0  # seconds without any answer that makes sense
OUTAGES: Counter[str] = Counter()  # what clients saw of all this
Train = Callable[[Mapping[str, np.ndarray], int, int], Arrays]
TRYING_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


def moments(weights: Mapping[str, np.ndarray], site: int, round: int) -> tuple[Arrays, Arrays]:
    """What site number `site` says of how its weights move: float64 means of w and of w*w."""
    first = {
        name: array.astype(np.float64) for name, array in trained(weights, site, round).items()
    }
    return first, {name: array * array + 0.25 for name, array in first.items()}


class Patient:
    """HTTP that goes on asking: no answer and 5xx are tried again, everything else is the answer."""

    def __init__(self, base: str, token: str, stop: threading.Event) -> None:
        self._http = http(base, token)
        self._stop = stop

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, url: str, **content: Any) -> httpx.Response:
        end, last = time.monotonic() + PATIENCE, "nothing"
        while time.monotonic() < end and not self._stop.is_set():
            try:
                response = self._http.request(method, url, **content)
            except httpx.TransportError as error:
                last = repr(error)
                OUTAGES[type(error).__name__] += 1
            else:
                if response.status_code not in TRYING_AGAIN:
                    return response
                last = f"{response.status_code} {response.text[:300]}"
                OUTAGES[str(response.status_code)] += 1
            time.sleep(0.2)
        raise TimeoutError(f"{method} {url}: {PATIENCE:.0f} s without an answer; the last: {last}")


class Site:
    """One participant until its training has ended; `acknowledged` holds the ids it was told."""

    blunt = False  # sends everything twice, and asks without waiting
    resuming = False  # sends updates by the tus protocol

    def __init__(
        self,
        base: str,
        token: str,
        number: int,
        stop: threading.Event,
        *,
        train: Train = trained,
        lag: float = 0.0,
        failing: frozenset[int] = frozenset(),
    ) -> None:
        """With seconds that round 0 takes longer, and rounds that it says at first it has failed in."""
        self._server = Patient(base, token, stop)
        self._stop = stop
        self._number = number
        self._train, self._lag, self._failing = train, lag, set(failing)
        self.acknowledged: list[tuple[int, str]] = []
        self.final: dict[str, Any] | None = None

    def run(self) -> None:
        with contextlib.closing(self._server):
            self._attend()

    def _attend(self) -> None:
        while self.final is None:
            wait = 0 if self.blunt else 5
            answer = _good(self._server.ask("GET", "/api/tasks/", params={"wait": wait})).json()
            if answer["state"] == "done":
                self.final = answer
            elif answer["state"] == "task":
                self._work(answer["task"])
            elif self.blunt:
                time.sleep(0.3)

    def _work(self, task: dict[str, Any]) -> None:
        if task["round"] in self._failing:
            said = {"code": "FOR_A_TEST", "text": "it failed on purpose"}
            _good(self._server.ask("POST", f"/api/tasks/{task['id']}/failure/", json=said))
            self._failing.discard(task["round"])
            return
        content = self._server.ask("GET", task["model"]["url"])
        if content.status_code == 404:  # the round has ended since: our update was the last one
            return
        weights = load(_good(content).content)
        if task["round"] == 0 and self._lag:
            self._stop.wait(self._lag)
        round, count = task["round"], {"sample_size": str(samples(self._number))}
        form = {"round": str(round), **count}
        files = {}
        if task["kind"] == "train":
            update = save(self.work(task, weights))
            if self.resuming:
                form["upload"] = in_pieces(self._server, update)
            else:
                files["model_file"] = update
        elif task["kind"] == "swag":
            first, second = moments(weights, self._number, round)
            files = {"first_moment_file": save(first), "second_moment_file": save(second)}
        else:
            form |= {"metric_names": "loss", "metric_values": repr(0.5 + self._number)}
        for _ in range(2 if self.blunt else 1):
            answer = self._server.ask("POST", task["upload_url"], data=form, files=files or None)
            if answer.status_code == 409:  # told before, in an answer that was lost
                return
            body = _good(answer).json()
            if task["kind"] == "train":
                self.acknowledged.append((round, body["update_id"]))

    def work(self, task: dict[str, Any], weights: Arrays) -> Arrays:
        """What the update holds."""
        return self._train(weights, self._number, task["round"])


class BluntSite(Site):
    """As somebody would write it with `requests` in an afternoon."""

    blunt = True


def _good(response: httpx.Response) -> httpx.Response:
    if not response.is_success:
        raise AssertionError(
            f"{response.request.method} {response.request.url}: "
            f"{response.status_code} {response.text[:500]}"
        )
    return response


class ResumingSite(Site):
    """Goes on with its uploads where the line broke off."""

    resuming = True


def in_pieces(server: Patient, content: bytes) -> str:
    """The id of a complete resumable upload, sent in two pieces or as many as it takes."""
    tus = {"Tus-Resumable": "1.0.0"}
    told = base64.b64encode(hashlib.sha256(content).hexdigest().encode()).decode()
    announced = {"Upload-Length": str(len(content)), "Upload-Metadata": f"sha256 {told}"}
    made = _good(server.ask("POST", "/api/uploads/", headers={**tus, **announced}))
    url = made.headers["Location"]
    while True:
        here = int(_good(server.ask("HEAD", url, headers=tus)).headers["Upload-Offset"])
        if here == len(content):
            return url.rstrip("/").rpartition("/")[2]
        piece = content[here : here + len(content) // 2 + 1]
        kind = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": str(here)}
        sent = server.ask("PATCH", url, headers={**tus, **kind}, content=piece)
        assert sent.status_code in (204, 409), sent.text  # 409: it had arrived, unheard


class PackagedSite(fl_client.Client):
    """The same with the package that sites install."""

    def __init__(
        self,
        base: str,
        token: str,
        number: int,
        stop: threading.Event,
        workdir: Path,
        *,
        train: Train = trained,
    ) -> None:
        self._where = (base, token, workdir)
        self._train = train
        self._number, self._stop = number, stop
        self.acknowledged: list[tuple[int, str]] = []  # the package doesn't tell the ids
        self.final: dict[str, Any] | None = None
        self.failures: list[str] = []

    def run(self) -> None:
        base, token, workdir = self._where
        self.final = fl_client.run(
            self, url=base, token=token, workdir=workdir, stop=self._stop, on_event=self._note
        )

    def _note(self, name: str, fields: dict[str, Any]) -> None:
        if name in {"failed", "stopped"}:
            self.failures.append(f"{name}: {json.dumps(fields, default=str)[:300]}")

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        return fl_client.FitResult(
            self._train(weights, self._number, config["round"]), samples(self._number)
        )

    def evaluate(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.EvaluateResult:
        return fl_client.EvaluateResult({"loss": 0.5 + self._number}, samples(self._number))

    def swag(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.SwagResult:
        return fl_client.SwagResult(
            *moments(weights, self._number, config["round"]), samples(self._number)
        )


class Hook:
    """A webhook endpoint that remembers which deliveries came."""

    def __init__(self) -> None:
        seen = self.seen = set[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                seen.add(str(uuid.UUID(self.headers["X-FL-Delivery"])))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True, name="hook").start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def quiet() -> None:
    """The package's lines would fill the report."""
    logging.getLogger("fl.client").setLevel(logging.CRITICAL)
