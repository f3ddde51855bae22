"""A model's stored preprocessing as the sandbox is told it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from django.conf import settings

from fl_server_ai.preprocessing.pipeline import document_of, parse_text
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.services.inference_inputs import IMAGE
from fl_server_ai.services.preprocessing import PIPELINE, SCRIPT, check_usable, kind_of
from fl_server_core.models import GlobalModel
from fl_server_core.storage import local_path


@contextmanager
def prepared_by(
    model: GlobalModel, tensor: RawTensor
) -> Iterator[tuple[Program | None, Preparation]]:
    """The module that inputs go through first, if there is one, as a file while the context lasts; and the rest.

    Raises what `check_usable` does: the preprocessing may be another than when the question came.
    """
    plain = Preparation(tensor.name == IMAGE, settings.FL_MAX_IMAGE_PIXELS, None, model.input_shape)
    blob = model.preprocessing
    if blob is None:
        yield None, plain
        return
    check_usable(blob)
    with local_path(blob) as path:
        if kind_of(blob) == PIPELINE:
            yield None, replace(plain, steps=document_of(parse_text(path.read_bytes())))
        elif kind_of(blob) == SCRIPT:
            yield Program(path, blob.digest, "torchscript"), plain
