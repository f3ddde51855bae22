"""The loop of a participating site: ask for a task, work it off, ask again."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from fl_client.client import Client, ReportErrors
from fl_client.errors import (
    NEVER_HEALS,
    ConnectionFailed,
    FLError,
    NotPermitted,
    ServerError,
    Throttled,
    is_settled,
)
from fl_client.journal import Journal
from fl_client.transport import Transport, backoff
from fl_client.webhook import Receiver
from fl_client.work import Worker

log = logging.getLogger("fl.client")

OnEvent = Callable[[str, dict[str, Any]], None]
_LONG_POLL = 25  # seconds the server may hold the question
_LOOK_ANYWAY = 30.0  # seconds between questions in webhook mode, for webhooks that got lost


def run(
    client: Client,
    *,
    url: str,
    token: str,
    mode: Literal["poll", "webhook"] = "poll",
    ca: str | Path | None = None,
    once: bool = False,
    forever: bool = False,
    workdir: str | Path | None = None,
    listen: tuple[str, int] = ("127.0.0.1", 8765),
    stop: threading.Event | None = None,
    on_event: OnEvent | None = None,
    report_errors: ReportErrors = "type",
    pack: bool = False,
) -> dict[str, Any] | None:
    """Take part until all trainings of this account have ended; return the final model's fields.

    With them: the last training's id as `training`, how it ended as `training_state` ("C" complete, "X" cancelled,
    "E" error) and the `reason`. Only a complete one's model is what was wanted: look at the state before using it.

    `once` works off what there is now and returns (for cron jobs), `forever` waits for the next
    training, `stop` ends the loop from another thread, after the task at hand and at most 25 s;
    then None is returned. A server that is away is waited for, except with `once`. Finished updates lie in `workdir` (default: a
    folder per account below ~/.fl_client) until the server has them: a process that was killed
    sends them when it starts again. One process per workdir.

    `report_errors` says what leaves this site when `fit` or `evaluate` raises: "type" only the name of
    the exception's class, "text" its message as well, "traceback" also files, lines and functions.
    Messages quote what they complain about: records, paths, hosts. The log here has everything.

    With `pack`, updates below 16 MiB are packed on their way (zstd if both have it, else gzip) where that makes
    them smaller: sparse and quantised ones, see `fl_client.encodings`. Larger ones go in pieces, as they are.

    It says who it is, what it waits for and what it does with INFO lines of the logger "fl.client", on
    stderr unless the program has configured logging.

    "webhook" listens at `listen` for the server's notifications, which only say when to ask.

    `on_event(name, fields)` is called with "task", "uploaded", "closed", "stopped", "failed",
    "offline", "listening" and "done", whose fields are those that are returned, also of a training that failed; and once for each of its updates that the server says does not count, with
    "refused" or "quarantined" and the update's `round`, `state` and `reason`. AuthenticationFailed and NotPermitted are raised, the latter
    with NOT_A_CLIENT for an account that no training may ask.
    """
    if report_errors not in get_args(ReportErrors):
        raise ValueError(f"report_errors is one of {get_args(ReportErrors)}, not {report_errors!r}")
    _be_heard()
    stop = stop or threading.Event()
    transport = Transport(url, token=token, ca=ca, attempts=3, stop=stop, pack=pack)
    try:
        folder = Path(workdir) if workdir is not None else _home(transport, token)
        worker = Worker(client, transport, Journal(folder), report_errors)
        agent = Agent(worker, transport, stop, on_event)
        if not once:
            agent.greet()
        agent.join()
        if once:
            return agent.work_off(forever=forever)
        if mode == "webhook":
            return agent.listen(listen, forever=forever)
        return agent.poll(forever=forever)
    finally:
        transport.close()


class Agent:
    """The two loops behind `run`."""

    def __init__(
        self,
        worker: Worker,
        transport: Transport,
        stop: threading.Event,
        on_event: OnEvent | None = None,
    ) -> None:
        self._worker = worker
        self._transport = transport
        self._stop = stop
        self._tell = on_event or (lambda name, fields: None)
        self._last = ""
        self._repeats = 0
        self._waiting = ""
        self._verdict: dict[str, Any] = {}
        self._ended = ""
        self._sent: tuple[Any, Any] = ("", None)  # training and round of the last update

    def greet(self) -> None:
        """Log who this is at which server; waits for a server that is away."""
        me = self._patiently(self._myself)
        if me is not None:
            where = self._transport.address.api
            log.info("%s at %s: asking for tasks", me.get("username", "an account"), where)

    def join(self) -> None:
        """Say what this site has; waits for a server that is away."""
        self._patiently(self._worker.join)

    def _myself(self) -> dict[str, Any]:
        try:
            me = self._transport.json("GET", "users/myself/", attempts=1)
        except FLError as error:
            if not is_settled(error):
                raise
            return {}  # a server that does not say; whether it gives out tasks, it says below
        return me if isinstance(me, dict) else {}

    def poll(self, *, forever: bool) -> dict[str, Any] | None:
        """Long polls, one after the other."""
        while not self._stop.is_set():
            asked = time.monotonic()
            answer = self._patiently(lambda: self._step(_LONG_POLL))
            if answer is None:
                break
            if answer["state"] == "wait":
                # A server that held the question that long has done the waiting.
                held = time.monotonic() - asked
                self._stop.wait(max(0.0, float(answer.get("retry_after", 2.0)) - held))
            elif answer["state"] == "done":
                if not forever:
                    return _final(answer)
                self._stop.wait(_LOOK_ANYWAY)
        return None

    def work_off(self, *, forever: bool = True) -> dict[str, Any] | None:
        """Everything there is to do now; the final model's fields if all has ended.

        Raises if the server is away. A task that is handed out again ends it too.
        """
        while not self._stop.is_set():
            answer = self._step(0)
            if answer["state"] == "done":
                return None if forever else _final(answer)
            if answer["state"] != "task" or self._repeats:
                return None
        return None

    def listen(self, where: tuple[str, int], *, forever: bool) -> dict[str, Any] | None:
        """Ask at the start, whenever a notification came, and every now and then."""
        answer = self._patiently(
            lambda: self._transport.json("POST", "users/myself/webhook-secret/", repeatable=True)
        )
        if answer is None:
            return None
        with Receiver(str(answer["webhook_secret"]), where) as receiver:
            self._tell("listening", {"address": receiver.address})
            while not self._stop.is_set():
                receiver.hint.clear()
                ended = self._patiently(lambda: {"final": self.work_off(forever=forever)})
                if ended is not None and ended["final"] is not None:
                    final: dict[str, Any] = ended["final"]
                    return final
                receiver.wait(_LOOK_ANYWAY, self._stop)
        return None

    def _step(self, wait: int) -> dict[str, Any]:
        answer: dict[str, Any] = self._transport.json(
            "GET", "tasks/", params={"wait": wait}, attempts=1, read_timeout=wait + 35.0
        )
        reason = str(answer.get("reason") or "")
        if answer.get("code") == "NOT_A_CLIENT":
            raise NotPermitted(0, "NOT_A_CLIENT", reason)
        if answer["state"] == "wait" and reason != self._waiting:
            log.info("waiting: %s", reason)
        self._waiting = reason
        self._judged(answer.get("own_update"))
        if answer["state"] == "task":
            self._work(answer["task"])
        elif answer["state"] == "done":
            self._over(answer)
            self._tell("done", _final(answer))
        return answer

    def _over(self, answer: dict[str, Any]) -> None:
        """Warn, once for each training, of an end without all that was wanted."""
        training = str(answer.get("training"))
        if answer.get("training_state", "C") != "C" and training != self._ended:
            log.warning("training %s did not complete: %s", training, answer.get("reason"))
        self._ended = training

    def _judged(self, update: Any) -> None:
        """Warn, once for each verdict, of an update that does not count, or not yet."""
        if not isinstance(update, dict) or update.get("state") not in ("refused", "quarantined"):
            return
        verdict = {name: update.get(name) for name in ("round", "state", "reason")}
        if verdict == self._verdict:
            return
        self._verdict = verdict
        log.warning("the update of round %(round)s is %(state)s: %(reason)s", verdict)
        self._tell(str(verdict["state"]), verdict)

    def _work(self, task: dict[str, Any]) -> None:
        self._repeats = self._repeats + 1 if task["id"] == self._last else 0
        if self._repeats and self._stop.wait(backoff(self._repeats, first=1.0)):
            return  # handed out again although it was answered: not in a tight loop
        self._unused(task)
        self._tell("task", {"task": task})
        log.info("round %s: %s", task.get("round"), task.get("kind"))
        ended = self._worker.work(task)
        log.info("round %s: %s %s", task.get("round"), task.get("kind"), ended)
        self._last = task["id"]
        self._tell(ended, {"task": task})
        self._judged(self._worker.receipt)
        if ended == "uploaded" and task.get("kind") == "train":
            self._sent = (task.get("training"), task.get("round"))

    def _unused(self, task: dict[str, Any]) -> None:
        """What the next task says of the last update, if no wait has said it."""
        training, number = self._sent
        unused = (task.get("own_updates") or {}).get("unused", [])
        known = (self._verdict.get("round"), self._verdict.get("state")) == (number, "refused")
        if training == task.get("training") and number in unused and not known:
            reason = "it was not used; the training's updates say why"
            self._judged({"round": number, "state": "refused", "reason": reason})

    def _patiently(self, act: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Until the server is back; None if stopped meanwhile. Refusals are raised."""
        attempt = 0
        while not self._stop.is_set():
            try:
                return act()
            except (ConnectionFailed, ServerError, Throttled) as error:
                if error.code in NEVER_HEALS:
                    raise
                pause = max(error.retry_after or 0.0, backoff(attempt))
                attempt += 1
                log.warning("trying again in %.1f s: %s", pause, error.detail)
                self._tell("offline", {"error": error, "retry_in": pause})
                self._stop.wait(pause)
        return None


def _be_heard() -> None:
    """Show INFO lines of "fl.client" on stderr, unless the program has set up logging itself."""
    ours = logging.getLogger("fl.client")
    if ours.hasHandlers() or ours.level != logging.NOTSET:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _final(answer: dict[str, Any]) -> dict[str, Any]:
    """The model's fields, and how its training ended; no model for who was taken out."""
    said = {
        name: answer[name] for name in ("training", "training_state", "reason") if name in answer
    }
    return {**(answer.get("final_model") or {}), **said}


def _home(transport: Transport, token: str) -> Path:
    account = hashlib.sha256(f"{transport.address.api}\0{token}".encode()).hexdigest()[:16]
    return Path.home() / ".fl_client" / account
