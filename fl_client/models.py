"""Global models: bringing weights to the server and back, and asking them."""

import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_client.download import SAFETENSORS, fetch
from fl_client.safetensors_io import load, save
from fl_client.transport import Transport
from fl_client.upload import send_file

Rows = list[dict[str, Any]]
PAUSE = 0.5  # seconds between two looks whether there is an answer


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self,
        *,
        name: str,
        description: str,
        weights: Any,
        input_shape: Sequence[int | None] | None = None,
        preprocessing: Mapping[str, Any] | str | Path | None = None,
    ) -> str:
        """Create a model and return its id.

        `weights` is a path, whose file is sent as it is, or a mapping of names to arrays or
        tensors, or a torch module; the latter are sent as safetensors. None in `input_shape`
        stands for a dimension of any size. `preprocessing` is applied to what the model is asked
        with: a pipeline `{"steps": [...]}`, or the path of a file with one, with torchvision's v2
        transforms or with a TorchScript module. Large files go on where the line broke, for a path
        also after a restart: `<path>.upload` beside it says where.
        """
        form = [("name", name), ("description", description)]
        form += [("input_shape", "None" if n is None else str(n)) for n in input_shape or ()]
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(weights, (str, Path)):
                path = Path(weights)
            else:
                path = Path(folder, "model.safetensors")
                save(path, _named_arrays(weights))
            beside = {}
            if preprocessing is not None:
                beside["model_preprocessing_file"] = _pipeline_file(preprocessing, Path(folder))
            answer = send_file(
                self._transport, "models/", form, path, key=str(uuid.uuid4()), beside=beside
            )
        return str(answer["model_id"])

    def set_preprocessing(self, model: str, preprocessing: Mapping[str, Any] | str | Path) -> None:
        """Replace what is done to the model's inputs; see `upload`."""
        with tempfile.TemporaryDirectory() as folder:
            file = _pipeline_file(preprocessing, Path(folder))
            self._transport.json(
                "POST",
                f"models/{model}/preprocessing/",
                files={"model_preprocessing_file": file},
                repeatable=True,
            )

    def ask(
        self,
        model: str,
        inputs: Any,
        *,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        calibration_input: Any = None,
        timeout: float = 600.0,
    ) -> dict[str, Any]:
        """The model's answer to `inputs`: `inference` and `uncertainty`, as nested lists.

        `inputs` is the path of an image (PNG, JPEG) or of a file of one tensor, or an array or nested
        lists, batch first, whose floats are sent as float32 if they are Python's. `method` and
        `options` are those of the model's training if left out. `calibration_input`, like `inputs` but no image, is
        for SWAG: a batch over which BatchNorm layers take their statistics anew for each draw. TimeoutError if there
        is no answer after `timeout` seconds.
        """
        ends = time.monotonic() + timeout
        form = [("model_id", model), ("return_format", "json")]
        if method is not None:
            form.append(("uncertainty_method", method))
        if options is not None:
            form.append(("options", json.dumps(options)))
        with tempfile.TemporaryDirectory() as folder:
            files = _input_files(folder, model_input=inputs, calibration_input=calibration_input)
            answer: dict[str, Any] = self._transport.json(
                "POST",
                "inference/",
                form=form,
                files=files,
                key=str(uuid.uuid4()),
                read_timeout=300.0,
            )
        while "inference" not in answer:
            if time.monotonic() > ends:
                raise TimeoutError(f"no answer after {timeout:g} s; it will be at {answer['url']}")
            self._transport.stop.wait(PAUSE)
            answer = self._transport.json("GET", answer["url"])
        return answer

    def download(
        self,
        model: str,
        path: str | Path | None = None,
        *,
        version: int | str | None = None,
        original: bool = False,
    ) -> Path:
        """Stream the weights to `path` (default `model-<id>.safetensors` here) and return it.

        The file is checked against the server's digest and appears only when complete; an
        interrupted download goes on where it stopped. `original` asks for the container in
        which the model was uploaded. BrokenFile if the bytes do not fit their digest.
        """
        suffix = ".pt" if original else ".safetensors"
        target = Path(path) if path is not None else Path(f"model-{model}{suffix}")
        url = f"models/{model}/" + (f"?version={version}" if version is not None else "")
        accept = "application/octet-stream" if original else SAFETENSORS
        fetch(self._transport, url, target, accept=accept)
        return target

    def weights(self, model: str, *, version: int | str | None = None) -> dict[str, Any]:
        """The weights as arrays by name, in the model's own dtypes."""
        with tempfile.TemporaryDirectory() as folder:
            return load(self.download(model, Path(folder, "model.safetensors"), version=version))

    def metrics(self, model: str) -> Rows:
        """Rows `key value_float step reporter identifier`, one per reporter and round.

        Rows with `identifier` "aggregated" and no reporter are the means over all reporters.
        """
        rows: Rows = self._transport.json("GET", f"models/{model}/metrics/")
        return rows

    def get(self, model: str) -> dict[str, Any]:
        """Name, description, owner, round and `stats` (sizes per layer, or None while `stats_state` is pending)."""
        fields: dict[str, Any] = self._transport.json("GET", f"models/{model}/metadata/")
        return fields

    def calibration(
        self,
        model: str,
        inputs: Any,
        labels: Any,
        *,
        method: str | None = None,
        bins: int = 15,
        calibration_input: Any = None,
        seconds: float = 300.0,
        **options: Any,
    ) -> dict[str, Any]:
        """How right the model's probabilities are on a labelled batch: `ece`, `nll`, `brier`, `auroc`, `bins`.

        `inputs` and `calibration_input` are those of `ask`, `labels` one integer a sample. `options` are the method's,
        such as `output="logits"` or `N=20`. Waits for the report up to `seconds`, then TimeoutError.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = _input_files(folder, model_input=inputs, calibration_input=calibration_input)
            paths["labels"] = Path(folder, "y")
            save(paths["labels"], _named_arrays({"labels": _array(labels)}))
            form = [("bins", str(bins)), ("options", json.dumps({"uncertainty": options}))]
            form += [("uncertainty_method", method)] if method else []
            report: dict[str, Any] = self._transport.json(
                "POST",
                f"models/{model}/calibration/",
                form=form,
                files=paths,
                key=uuid.uuid4().hex,
                read_timeout=120.0,
            )
        end = time.monotonic() + seconds
        while report["state"] not in {"done", "failed"}:
            if time.monotonic() > end:
                raise TimeoutError(f"no report of job {report['job_id']} after {seconds} s")
            time.sleep(1.0)
            report = self._transport.json("GET", f"calibrations/{report['job_id']}/")
        return report

    def list(self) -> Rows:
        rows: Rows = self._transport.json("GET", "models/")
        return rows

    def delete(self, model: str) -> None:
        self._transport.json("DELETE", f"models/{model}/")


def _input_files(folder: str, **inputs: Any) -> dict[str, Path]:
    """Each input that is given as a file: its own, or one made of its numbers."""
    files = {}
    for name, given in inputs.items():
        if isinstance(given, (str, Path)):
            files[name] = Path(given)
        elif given is not None:
            files[name] = Path(folder, f"{name}.safetensors")
            save(files[name], {"input": _array(given)})
    return files


def _named_arrays(weights: Any) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        return weights
    if callable(getattr(weights, "state_dict", None)):
        state: Mapping[str, Any] = weights.state_dict()
        return state
    raise TypeError(f"weights must be a path, a mapping or a module, not {type(weights).__name__}")


def _pipeline_file(preprocessing: Mapping[str, Any] | str | Path, folder: Path) -> Path:
    if isinstance(preprocessing, (str, Path)):
        return Path(preprocessing)
    path = folder / "preprocessing.json"
    path.write_text(json.dumps(preprocessing), encoding="utf-8")
    return path


def _array(inputs: Any) -> Any:
    if not isinstance(inputs, (list, tuple)):
        return inputs  # NumPy's or torch's, in its own dtype
    import numpy as np

    array = np.asarray(inputs)
    return array.astype(np.float32) if array.dtype == np.float64 else array
