"""Asking a model: who may, with which weights, by which method; the answer comes from a worker."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from django.conf import settings
from django.db import connection

from fl_server_ai.dispatch import dispatch_inference
from fl_server_ai.notifications import wakeups
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.services.inference_inputs import (
    CALIBRATION,
    IMAGE,
    check_input,
    named_calibration,
)
from fl_server_ai.services.models import PROGRAMS
from fl_server_ai.services.preprocessing import check_usable
from fl_server_ai.services.tensor_bytes import got, packed, put, unpacked
from fl_server_ai.uncertainty import UNCERTAINTY
from fl_server_ai.uncertainty import Kind as Draws
from fl_server_ai.uncertainty.options import CommonOptions, merge_options
from fl_server_core.commits import unsynced
from fl_server_core.connections import connection_release
from fl_server_core.exceptions import Invalid, NotFound, TooManyQuestions, Unusable
from fl_server_core.lifecycle import EventState
from fl_server_core.models import Blob, GlobalModel, InferenceJob, LocalModel, Training, User
from fl_server_core.models.inference import JobKind
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.models.weights import ModelType
from fl_server_core.selectors import get_visible, local_models_visible_to, models_visible_to
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.inference import job_create, job_keep
from fl_server_core.services.moments import combined_moments

UPLOAD = (
    "upload it as a torch.export program: torch.export.save(torch.export.export(model.eval(), (example,), "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), 'model.pt2') with an example of two rows; or as "
    "TorchScript: torch.jit.save(torch.jit.script(model), 'model.pt'); and that file as model_file of "
    "POST models/"
)
ENDED = (EventState.DONE, EventState.FAILED)
RETRY_SECONDS = 5
SOON = 0.25  # seconds; who waits longer does so without a connection
FIRST_PAUSE, LONGEST_PAUSE, LATE_PAUSE = 0.01, 0.05, 0.5


@dataclass(frozen=True)
class Subject:
    """What is asked: a model's program with its current weights, or with those of a local model."""

    model: GlobalModel
    local: LocalModel | None
    weights: Blob

    @property
    def training(self) -> Training | None:
        """Whose uncertainty method counts where the request names none."""
        return Training.objects.filter(model=self.model).first()


def subject_of(*, user: User, model_id: object) -> Subject:
    """A global or local model that the user sees. `Unusable` (NOT_EXECUTABLE) if it has no program."""
    try:
        model = get_visible(models_visible_to(user), model_id)
    except NotFound:
        local = get_visible(local_models_visible_to(user), model_id)
        if local.blob is None:
            raise NotFound(
                "the file of this update was deleted after its round", code="FILE_DELETED"
            ) from None
        subject = Subject(local.training.model, local, local.blob)
    else:
        subject = Subject(model, None, model.weights.blob)
    container = subject.model.container
    if subject.model.type != ModelType.MEAN and container not in PROGRAMS:
        held = (
            "came from torch.save, which holds weights or a pickled module, and pickles are never run"
            if container == "torch"
            else f"came as {container}, which holds weights and no program"
        )
        raise Unusable(f"this model can't be run: it {held}; {UPLOAD}", code="NOT_EXECUTABLE")
    return subject


def method_of(
    subject: Subject, method: str | None, given: Mapping[str, Any]
) -> tuple[str, CommonOptions]:
    """The method and all its options: the request's over its training's. `Invalid` names every fault."""
    training = subject.training
    mean = subject.model.type == ModelType.MEAN
    usual: str = training.uncertainty_method if training else UncertaintyMethod.NONE
    if mean:
        usual = UncertaintyMethod.ENSEMBLE
    name = method or usual
    if name not in UNCERTAINTY:
        raise Invalid(
            f"there is no uncertainty method {name[:64]!r}; there are {', '.join(UNCERTAINTY)}",
            code="UNKNOWN_METHOD",
            errors=[
                {
                    "pointer": "/uncertainty_method",
                    "code": "unknown",
                    "detail": f"one of {', '.join(UNCERTAINTY)}",
                }
            ],
        )
    kind = UNCERTAINTY[name]
    defaults = training.options.get("uncertainty", {}) if training else {}
    options = merge_options(kind.Options, defaults, _uncertainty(given))
    if mean and kind.kind != Draws.MEMBERS:
        raise Unusable(f"a MEAN model is asked by its members, not by {name}", code="MEMBERS_ONLY")
    if kind.kind == Draws.MEMBERS and (subject.local or not subject.model.members.exists()):
        ensemble = training is not None and training.uncertainty_method == name
        raise Unusable(
            f"{name} asks the sites' models of a training's newest round, and "
            + ("a local model has none" if subject.local else "no round of this one has ended yet")
            + "; ask with another uncertainty_method, such as NONE"
            if ensemble
            else f"{name} asks the members of a MEAN model; make one with POST models/ and type=MEAN",
            code="NO_MEMBERS",
        )
    if kind.kind == Draws.WEIGHTS and (
        subject.local or training is None or combined_moments(training) is None
    ):
        raise Unusable(
            f"{name} draws weights from the moments of a training's SWAG rounds, and "
            + (
                "a local model has none"
                if subject.local
                else "no such round of this model has ended"
            )
            + "; ask with another uncertainty_method, such as NONE",
            code="NO_MOMENTS",
        )
    return name, options


def _uncertainty(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """`options.uncertainty` of a request; its options have nothing else."""
    for name in given:
        if name != "uncertainty":
            raise Invalid(
                f"/options/{name[:64]}: an inference has options.uncertainty only",
                code="BAD_OPTION",
                errors=[
                    {"pointer": f"/options/{name[:64]}", "code": "unknown", "detail": "unknown"}
                ],
            )
    found = given.get("uncertainty", {})
    if not isinstance(found, Mapping):
        raise Invalid(
            "/options/uncertainty: an object",
            code="BAD_OPTION",
            errors=[{"pointer": "/options/uncertainty", "code": "type", "detail": "an object"}],
        )
    return found


def inference_ask(
    *,
    user: User,
    subject: Subject,
    tensor: RawTensor,
    method: str,
    options: CommonOptions,
    return_format: str,
    calibration: RawTensor | None = None,
    kind: str = JobKind.ANSWER,
    more: Sequence[RawTensor] = (),
) -> InferenceJob:
    """Store the question and hint at it; `Invalid` (INPUT_SHAPE) if the model can't take the input.

    An image, or what a model's preprocessing is for, is checked in the sandbox, when it is prepared.
    `calibration` is a batch over which the statistics of BatchNorm layers are taken anew for each draw of
    the weights; `Invalid` (NO_CALIBRATION) for methods that draw none.
    """
    members = _members(user, subject.model, method)
    asked = [subject.model, *members]
    stored = [model.preprocessing for model in asked if model.preprocessing is not None]
    for preprocessing in stored:
        check_usable(preprocessing)
    prepared = bool(stored) or tensor.name == IMAGE
    for model in asked:
        check_input(tensor, None if prepared else model.input_shape)
    given = [tensor]
    if calibration is not None:
        _check_calibration(calibration, subject, method, prepared=bool(stored))
        given.append(replace(calibration, name=CALIBRATION))
    waiting = InferenceJob.objects.filter(user=user).exclude(state__in=ENDED).count()
    if waiting >= settings.FL_INFERENCE_QUEUE:
        raise TooManyQuestions(
            f"{waiting} of your questions wait for an answer; ask again when some have one",
            retry_after=RETRY_SECONDS,
        )
    # Within another transaction, such as a remembered key's, the row will be durable: so must be its file.
    data, file = put(packed([*given, *more]), synced=connection.in_atomic_block)
    try:
        with unsynced():
            job = job_create(
                user=user, model=subject.model, local_model=subject.local, weights=subject.weights,
                kind=kind, method=method, options=asdict(options), return_format=return_format,
                data=data, file=file,
            )  # fmt: skip
            dispatch_inference(job.pk)
    finally:
        if file is not None:
            blob_discard(blob=file)  # unless it has a row by now
    return job


def _members(user: User, mean: GlobalModel, method: str) -> list[GlobalModel]:
    """The models that a method of members asks. Those of a MEAN model must still be visible to who asks."""
    if UNCERTAINTY[method].kind != Draws.MEMBERS:
        return []
    members = list(mean.members.select_related("model__preprocessing"))
    for member in members if mean.type == ModelType.MEAN else []:
        if member.local_model_id is not None:
            get_visible(local_models_visible_to(user), member.local_model_id)
        else:
            get_visible(models_visible_to(user), member.model_id)
    return [member.model for member in members]


def _check_calibration(batch: RawTensor, subject: Subject, method: str, *, prepared: bool) -> None:
    with named_calibration():
        if UNCERTAINTY[method].kind != Draws.WEIGHTS:
            said = f"for methods that draw weights, such as SWAG; {method} draws none, leave it out"
            raise Invalid(
                said,
                code="NO_CALIBRATION",
                errors=[{"pointer": "/calibration_input", "code": "contradiction", "detail": said}],
            )
        if batch.name == IMAGE:
            raise Invalid(
                "one image is no batch; send a tensor of several inputs", code="BAD_INPUT"
            )
        check_input(batch, None if prepared else subject.model.input_shape)


def inference_wait(*, job: InferenceJob, seconds: float) -> InferenceJob:
    """The job as it is once it has ended, or after so many seconds and then durable.

    Call it outside of transactions. The worker's wake-up ends a pause; one that got lost costs the pause.
    """
    rows = InferenceJob.objects.select_related("result_file").filter(pk=job.pk)
    user, start = str(job.user_id), time.monotonic()
    while True:
        seen = wakeups.generation(user)
        found = rows.first()
        if found is None:
            raise NotFound("this inference is gone: its model was deleted")
        if found.state in ENDED:
            return found
        past = time.monotonic() - start
        if past >= seconds:
            job_keep(job=found)
            return found
        # A tenth of what it has taken: the answer comes at most that much later than it could.
        longest = LONGEST_PAUSE if past < SOON else LATE_PAUSE
        pause = min(max(FIRST_PAUSE, past / 10), longest, seconds - past)
        if past >= SOON:
            connection_release()
        wakeups.wait(user, seen, pause, look=False)


def inference_answer(job: InferenceJob) -> bytes:
    """A finished job's tensors as safetensors: `inference`, `uncertainty.variance` and so on."""
    return got(job.result_bytes, job.result_file)


def inference_json(data: bytes) -> dict[str, Any]:
    """The same as nested lists. `Unusable` (ANSWER_TOO_LARGE) for more numbers than fit JSON well."""
    tensors = unpacked(data)
    numbers = sum(tensor.numpy().size for tensor in tensors.values())
    if numbers > settings.FL_MAX_JSON_NUMBERS:
        raise Unusable(
            f"the answer has {numbers:,} numbers, as JSON {settings.FL_MAX_JSON_NUMBERS:,} are "
            "allowed; ask with return_format binary or npz",
            code="ANSWER_TOO_LARGE",
        )
    nested = {name: tensor.numpy().tolist() for name, tensor in tensors.items()}
    return {
        "inference": nested.pop("inference"),
        "uncertainty": {name.partition(".")[2]: value for name, value in nested.items()},
    }
