"""An input made ready in the child: decoded, then through a pipeline or a TorchScript module, then fitting the model."""

import io
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.preprocessing.pipeline import EXAMPLE, parse
from fl_server_ai.sandbox.drawing import NAMES, Received, made
from fl_server_ai.sandbox.image_steps import carried_out, to_unit
from fl_server_ai.sandbox.images import decoded
from fl_server_ai.sandbox.loading import load
from fl_server_ai.sandbox.pipes import Refusal
from fl_server_ai.sandbox.preparation import DECLARE, misfit


class Before:
    """A TorchScript module that inputs go through first: one tensor in, one tensor out."""

    def __init__(self, program: bytearray) -> None:
        self._file = io.BytesIO(program)
        self._model = load("torchscript", self._file, "cpu")

    def run(self, given: Tensor) -> Tensor:
        """Its answer; afterwards it is as it was loaded."""
        try:
            answer = self._model.run((given.clone(),))
        except MemoryError:
            raise
        except Exception as error:  # whatever a program raises
            raise Refusal(
                "PREPROCESSING_FAILED",
                f"the model's preprocessing: {type(error).__name__}: {error}",
            ) from error
        finally:
            if self._model.changed():
                with torch.inference_mode(mode=False):  # whose tensors count no changes
                    self._model = load("torchscript", self._file, "cpu")
        if not isinstance(answer, Tensor):
            raise Refusal("PREPROCESSING_FAILED", "the model's preprocessing answers no tensor")
        return answer


def before_of(received: Received) -> Before | None:
    """The module whose archive came along when the program was to be loaded."""
    return Before(received[0][3]) if received else None


def prepared(demands: dict[str, Any], received: Received, before: Before | None) -> Received:
    """The one input as the program is to see it, in the form in which it came."""
    if demands["steps"] is None and before is None and not demands["image"]:
        return received
    (one,) = received
    with torch.inference_mode():
        given = decoded(one[3], demands["pixels"]) if demands["image"] else made(one)
        if before is not None:
            given = before.run(given)
        elif demands["steps"] is not None:
            given = carried_out(parse(demands["steps"]), given)
        else:
            given = to_unit(given)
        if given.dtype not in NAMES or given.layout != torch.strided:
            raise Refusal(
                "PREPROCESSING_FAILED", f"the model's preprocessing answers {given.dtype}"
            )
        wrong = misfit(given.shape, demands["shape"])
        if wrong:
            raise Refusal("INPUT_SHAPE", _told(demands, before, wrong))
        flat = given.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return [
            (one[0], NAMES[given.dtype], tuple(given.shape), flat.view(torch.uint8).numpy().data)
        ]


def _told(demands: dict[str, Any], before: Before | None, wrong: str) -> str:
    if before is None and demands["steps"] is None:
        return f"the image has shape {wrong}. The model has no preprocessing: {DECLARE}, such as {EXAMPLE}"
    return f"after the model's preprocessing the input has shape {wrong}. To change it, {DECLARE}"
