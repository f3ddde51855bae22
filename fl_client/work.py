"""One task from its arrival to its answer: download, train or evaluate, send."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_client.arrays import BFloat16, array_of, floats_of, is_torch
from fl_client.client import (
    Client,
    Context,
    EvaluateResult,
    FitResult,
    ReportErrors,
    described,
)
from fl_client.download import SAFETENSORS, fetch
from fl_client.errors import Conflict, FLError, Stopped, is_settled
from fl_client.journal import Entry, Journal
from fl_client.memory import forget_round
from fl_client.personal import together
from fl_client.safetensors_io import load, save
from fl_client.transport import Transport
from fl_client.upload import send_file

log = logging.getLogger("fl.client")

Task = dict[str, Any]
NO_SWAG = "this site's client has no swag method; fl_client.SwagCollector helps to write one"
CHAINING_REFUSED = "this training hands each site's model to another site, which this site refuses"
NO_INITIAL_WEIGHTS = "this client has no initial_weights method"
NO_EVALUATE = "this client has no evaluate method"


def _capabilities(client: Client) -> list[str]:
    """The kinds of tasks that this client's class knows."""
    kinds = {"train": "fit", "evaluate": "evaluate", "swag": "swag"}
    kinds["initial_weights"] = "initial_weights"
    return [
        kind
        for kind, method in kinds.items()
        if getattr(type(client), method) is not getattr(Client, method)
    ]


class Worker:
    """Works tasks off for one client; what is finished is journalled before it is sent."""

    def __init__(
        self,
        client: Client,
        transport: Transport,
        journal: Journal,
        report_errors: ReportErrors = "type",
    ) -> None:
        self._client = client
        self._report_errors = report_errors
        self._transport = transport
        self._journal = journal
        self.receipt: dict[str, Any] = {}  # what the server said last to something sent

    def work(self, task: Task) -> str:
        """Return how it ended: "uploaded", "closed" (too late), "stopped" or "failed".

        A failure of the task is reported to the server and is no exception. What is raised is
        the way to the server: ask for the task again later; a finished update is then re-sent.
        """
        kind = task.get("kind")
        self.receipt = {}
        try:
            if kind == "train":
                if _hands_on(task) and not self._client.share_raw_model:
                    return self.fail(task, "CHAINING_REFUSED", CHAINING_REFUSED, "")
                return self._train(task)
            if kind == "initial_weights":
                if type(self._client).initial_weights is Client.initial_weights:
                    return self.fail(
                        task, "INITIAL_WEIGHTS_NOT_IMPLEMENTED", NO_INITIAL_WEIGHTS, ""
                    )
                return self._initial(task)
            if kind == "swag":
                if type(self._client).swag is Client.swag:
                    return self.fail(task, "SWAG_NOT_IMPLEMENTED", NO_SWAG, "")
                return self._swag(task)
            if kind == "evaluate":
                if type(self._client).evaluate is Client.evaluate:
                    return self.fail(task, "EVALUATE_NOT_IMPLEMENTED", NO_EVALUATE, "")
                return self._evaluate(task)
        except Stopped as stopped:
            log.info("%s", stopped)
            return "stopped"
        except ImportError as error:
            return self.fail(task, "UNSUPPORTED_DTYPE", str(error), "")
        except FLError as error:
            if not is_settled(error):
                raise
            return self.fail(task, error.code or "REFUSED", str(error), "")
        return self.fail(task, "UNSUPPORTED_KIND", f"this client knows no {kind!r} tasks", "")

    def join(self) -> dict[str, Any]:
        """Say what this site has, if its client names anything; what trainings still miss is logged."""
        client = self._client
        if not client.attributes and client.num_examples is None:
            return {}
        body = {
            "capabilities": _capabilities(client),
            "attributes": dict(client.attributes),
            "num_examples": client.num_examples,
        }
        answer: dict[str, Any] = self._transport.json(
            "POST", "clients/me/join/", body=body, repeatable=True
        )
        for missing in answer["missing"]:
            log.warning(
                "training %s cannot ask this site: %s", missing["training"], missing["text"]
            )
        return answer

    def fail(self, task: Task, code: str, text: str, tail: str) -> str:
        """Give the task back. If the server has no use for that any more, it is as good."""
        log.warning("task %s failed: %s: %s", task["id"], code, text)
        body = {"code": code, "text": text, "log_tail": tail}
        try:
            self._transport.json("POST", f"tasks/{task['id']}/failure/", body=body, repeatable=True)
        except FLError as error:
            if not is_settled(error):
                raise
            log.info("the failure of task %s was not wanted: %s", task["id"], error.detail)
        return "failed"

    def _train(self, task: Task) -> str:
        entry = self._journal.get(task["id"])
        if entry is None:
            weights = self._weights(task)
            given = {name: (_shape(value), value.dtype) for name, value in weights.items()}
            try:
                result = self._client.fit(
                    weights, dict(task.get("config") or {}), self._context(task, self._extras(task))
                )
                update = _fitting(result, given, dict(task.get("config") or {}))
                form = _train_form(task, result)
                digest = save(
                    self._journal.place(task["id"]),
                    update | extra_tensors(result.extras),
                    dict(result.metadata),
                )
            except Stopped:
                raise
            except Exception as error:  # noqa: BLE001 - the site's own code may raise anything
                return self._fail_with(task, error)
            del weights
            entry = self._journal.put(task["id"], digest, form)
        else:
            log.info("sending the finished update of task %s again", task["id"])
        return self._send(task, entry)

    def _initial(self, task: Task) -> str:
        entry = self._journal.get(task["id"])
        if entry is None:
            try:
                weights = self._client.initial_weights(
                    dict(task.get("config") or {}), self._context(task)
                )
                digest = save(self._journal.place(task["id"]), weights)
            except Stopped:
                raise
            except Exception as error:  # noqa: BLE001 - the site's own code may raise anything
                return self._fail_with(task, error)
            entry = self._journal.put(task["id"], digest, [("meta", '{"num_examples": 1}')])
        return self._send(task, entry)

    def _send(self, task: Task, entry: Entry) -> str:
        path = self._journal.place(task["id"])
        try:
            ended = self._deliver(task, task["upload_url"], entry.form, {"model_file": path})
        except FLError as error:
            if is_settled(error):
                self._journal.drop(task["id"])
            raise
        self._journal.drop(task["id"])
        if ended == "closed":
            forget_round(self._memories(task), int(task["round"]))
        return ended

    def _swag(self, task: Task) -> str:
        weights = self._weights(task)
        first = self._journal.place(task["id"])
        second, third = first.with_suffix(".second"), first.with_suffix(".deviations")
        files = {"first_moment_file": first, "second_moment_file": second}
        try:
            result = self._client.swag(weights, dict(task.get("config") or {}), self._context(task))
            form = [("round", str(task["round"])), ("sample_size", str(int(result.num_examples)))]
            save(first, result.first)
            save(second, result.second)
            if result.deviations is not None:
                save(third, result.deviations)
                files["deviations_file"] = third
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - the site's own code may raise anything
            return self._fail_with(task, error)
        try:
            return self._deliver(task, task["upload_url"], form, files)
        finally:
            for path in (first, second, third):
                path.unlink(missing_ok=True)

    def _evaluate(self, task: Task) -> str:
        weights = self._weights(task)
        try:
            result = self._client.evaluate(
                weights, dict(task.get("config") or {}), self._context(task)
            )
            form = _evaluate_form(task, result)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - the site's own code may raise anything
            return self._fail_with(task, error)
        return self._deliver(task, f"models/{task['model']['id']}/metrics/", form, {})

    def _deliver(
        self, task: Task, url: str, form: list[tuple[str, str]], files: dict[str, Path]
    ) -> str:
        try:
            if files.keys() == {"model_file"}:
                answer = send_file(self._transport, url, form, files["model_file"])
            else:
                answer = self._transport.json(
                    "POST", url, form=form, files=files, repeatable=True, read_timeout=300.0
                )
        except Conflict as error:
            log.info("task %s is over: %s", task["id"], error.detail)
            return "closed"
        self.receipt = answer if isinstance(answer, dict) else {}
        return "uploaded"

    def _weights(self, task: Task) -> dict[str, Any]:
        model = task["model"]
        path = self._journal.folder / "model.safetensors"
        fetch(self._transport, model["url"], path, accept=SAFETENSORS, sha256=model.get("sha256"))
        try:
            return load(path)
        finally:
            path.unlink()

    def _extras(self, task: Task) -> dict[str, dict[str, Any]]:
        """What the strategy sends beside the weights, by name and tensor."""
        told = task.get("extras")
        if not told:
            return {}
        path = self._journal.folder / "extras.safetensors"
        fetch(self._transport, told["url"], path, accept=SAFETENSORS, sha256=told.get("sha256"))
        try:
            tensors = load(path)
        finally:
            path.unlink()
        extras: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            _, namespace, key, tensor = name.split(".", 3)
            extras.setdefault(f"{namespace}.{key}", {})[tensor] = value
        return extras

    def _memories(self, task: Task) -> Path:
        name = hashlib.sha256(str(task.get("training")).encode()).hexdigest()[:16]
        return self._journal.folder / "trainings" / name

    def _context(self, task: Task, extras: dict[str, dict[str, Any]] | None = None) -> Context:
        def report(body: dict[str, Any]) -> dict[str, Any]:
            try:
                url = f"tasks/{task['id']}/progress/"
                answer = self._transport.json("POST", url, body=body, attempts=1)
            except FLError as error:
                log.info("progress of task %s was not heard: %s", task["id"], error.detail)
                return {}
            return answer if isinstance(answer, dict) else {}

        return Context(task, report, extras=extras, folder=self._memories(task))

    def _fail_with(self, task: Task, error: Exception) -> str:
        log.error("task %s failed in the site's own code", task["id"], exc_info=error)
        said = self._client.describe_failure(error) or described(error, self._report_errors)
        return self.fail(task, "TRAIN_EXCEPTION", *said)


def _train_form(task: Task, result: FitResult) -> list[tuple[str, str]]:
    form = [("round", str(task["round"])), ("sample_size", str(int(result.num_examples)))]
    if result.num_steps is not None:
        form.append(("num_steps", str(int(result.num_steps))))
    return form + _metric_fields(result.metrics)


def _evaluate_form(task: Task, result: EvaluateResult) -> list[tuple[str, str]]:
    if not isinstance(result, EvaluateResult):
        raise TypeError(f"evaluate must return an EvaluateResult, not {type(result).__name__}")
    form = [("round", str(task["round"])), ("sample_size", str(int(result.num_examples)))]
    return form + _metric_fields(result.metrics)


def _metric_fields(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    fields = []
    for name, value in metrics.items():
        fields += [("metric_names", name), ("metric_values", repr(float(value)))]
    return fields


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in value.shape)


def extra_tensors(extras: Mapping[str, Any]) -> dict[str, Any]:
    """Extras under the names that they have in the file; a number becomes a float64."""
    import numpy as np

    tensors: dict[str, Any] = {}
    for name, value in extras.items():
        if isinstance(value, Mapping):
            tensors |= {f"extra.{name}.{tensor}": array for tensor, array in value.items()}
        else:
            tensors[f"extra.{name}"] = np.array(float(value))
    return tensors


def _fitting(
    result: FitResult, given: dict[str, tuple[tuple[int, ...], Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The update with the names, shapes and dtypes handed out, without what stays at the sites.

    `extra.*` tensors pass as they are, and so does what the metadata says is coded: the server knows how.
    """
    if not isinstance(result, FitResult):
        raise TypeError(f"fit must return a FitResult, not {type(result).__name__}")
    if result.metadata:
        return {name: value for name, value in result.weights.items() if _sent(name, config)}
    extra = {name for name in result.weights if name.startswith("extra.") and name not in given}
    differing = (set(result.weights) - extra) ^ set(given)
    if wrong := {name for name in differing if name not in given or together(name, config)}:
        raise ValueError(
            f"fit must return exactly the tensors it was given; differing: {sorted(wrong)}"
        )
    update = {}
    for name, value in result.weights.items():
        if name not in extra and not together(name, config):
            continue
        if name not in extra:
            shape, dtype = given[name]
            if _shape(value) != shape:
                raise ValueError(f"{name!r} must keep its shape {shape}, not {_shape(value)}")
            value = _cast(value, dtype)
        update[name] = value
    return update


def _sent(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a coded update goes out, with what belongs to its code."""
    if name.startswith("extra.enc."):
        name = name.split(".", 3)[3]
    return name.startswith("extra.") or together(name, config)


def _cast(value: Any, dtype: Any) -> Any:
    """NumPy computes in float64 unasked; widths may change, kinds may not. What is torch's stays as it is."""
    if is_torch(value) or value.dtype == dtype:
        return value
    if str(dtype) == "torch.bfloat16" and floats_of(value) is not None:
        return BFloat16(value)
    return value if is_torch_dtype(dtype) else array_of(value).astype(dtype, casting="same_kind")


def is_torch_dtype(dtype: object) -> bool:
    return type(dtype).__module__ == "torch"


def _hands_on(task: Task) -> bool:
    """Whether the model that this site sends goes to another site as it is."""
    return bool((task.get("config") or {}).get("daisy_chain"))
