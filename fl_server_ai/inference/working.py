"""One worker, one question: claim it, run the program in the sandbox, store the answer or the refusal."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from django.db import OperationalError

from fl_server_ai.inference import pool
from fl_server_ai.inference.counting import count
from fl_server_ai.inference.draws import as_raw, as_tensor, draws_of, weights_of
from fl_server_ai.inference.files import program_file
from fl_server_ai.inference.preprocessing import prepared_by
from fl_server_ai.notifications import wakeups
from fl_server_ai.sandbox.plans import Drawn, Plain
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.services.calibration import BINS, LABELS, REPORT
from fl_server_ai.services.inference_inputs import CALIBRATION, IMAGE, INPUT
from fl_server_ai.services.leases import lease_kept
from fl_server_ai.services.models import PROGRAMS
from fl_server_ai.services.tensor_bytes import got, packed, put, unpacked
from fl_server_ai.uncertainty import UNCERTAINTY, Kind, Method
from fl_server_ai.uncertainty.answer import Answer
from fl_server_ai.uncertainty.methods.ensemble import EnsembleOptions
from fl_server_ai.uncertainty.options import parse_options
from fl_server_ai.uncertainty.report import calibration_report
from fl_server_ai.uncertainty.summary import Summary, plain_answer
from fl_server_core.exceptions import Conflict, DomainError, Unavailable
from fl_server_core.killpoints import reached
from fl_server_core.models import Blob, GlobalModel, InferenceJob, MeanMember
from fl_server_core.models.inference import JobKind
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.inference import (
    job_claim,
    job_fail,
    job_finish,
    job_release,
    job_renew,
)
from fl_server_core.storage import local_path

log = logging.getLogger("fl.celery")


def job_work(job_id: int) -> None:
    """Answer the job if it is there to be claimed; otherwise nothing happens."""
    job = job_claim(job_id=job_id)
    if job is None:
        return
    with lease_kept(partial(job_renew, job=job)):
        try:
            if job.kind == JobKind.STATISTICS:
                count(job)
                job_finish(job=job, data=None, file=None)
                return
            notes: list[str] = []
            if job.kind == JobKind.CALIBRATION:
                report = _judged(job, notes)
                reached("report.judged")
                _store(job, [report], notes)
                return
            answer = _answer(job, notes)
            reached("question.answered")
            _store(job, [as_raw(t, name) for name, t in answer.tensors().items()], notes)
        except DomainError as error:
            job_fail(job=job, error=error)
        except (OSError, OperationalError) as error:  # the disk or the database, not the question
            log.warning("inference %s waits: %s", job.pk, error)
            job_release(job=job)
        except Exception:
            log.exception("inference %s failed", job.pk)
            job_fail(job=job, error=Unavailable("the server failed; its log says why"))
    wakeups.publish([str(job.user_id)])


def _answer(job: InferenceJob, notes: list[str]) -> Answer:
    """What the model says; what the asker should know beside it goes to `notes`."""
    if job.weights is None:
        raise Conflict("these weights were deleted meanwhile", code="WEIGHTS_DELETED")
    given = unpacked(got(job.input_bytes, job.input_file))
    tensor = given[IMAGE] if IMAGE in given else given[INPUT]
    kind = UNCERTAINTY[job.method]
    method: Method[Any] = kind(parse_options(kind.Options, job.options))
    if method.kind == Kind.MEMBERS:
        return _mixture(job, method.options, tensor)
    with ExitStack() as stack:
        canonical = stack.enter_context(local_path(job.weights))
        plan = stack.enter_context(draws_of(method, job, canonical))
        if isinstance(plan, Drawn) and CALIBRATION in given:
            calibrated = partial(_note_calibration, notes)
            plan = replace(plan, calibration=((given[CALIBRATION],),), calibrated=calibrated)
        before, preparation = stack.enter_context(prepared_by(job.model, tensor))
        program = stack.enter_context(_program(job, job.model, job.weights, before))
        outputs = pool.predict(program, tensor, plan, preparation)
    if method.kind == Kind.PLAIN and job.kind == JobKind.ANSWER:
        return plain_answer(as_tensor(outputs[0]), method.options.task)
    summary = Summary(method.options)
    for output in outputs:
        summary.add(as_tensor(output))
    return summary.answer()


def _note_calibration(notes: list[str], layers: int) -> None:
    if not layers:
        notes.append(
            "CALIBRATION_UNUSED: the program has no BatchNorm layer with running statistics; "
            "calibration_input changed nothing"
        )


def _judged(job: InferenceJob, notes: list[str]) -> RawTensor:
    """The report as the bytes of a JSON text."""
    given = unpacked(got(job.input_bytes, job.input_file))
    labels = as_tensor(given[LABELS])
    report = calibration_report(_answer(job, notes), labels, int(given[BINS].numpy()))
    text = json.dumps(report, allow_nan=False).encode()
    return RawTensor("U8", (len(text),), text, REPORT)


def _mixture(job: InferenceJob, options: EnsembleOptions, tensor: RawTensor) -> Answer:
    """The members' answers, one at a time: global models with their newest weights, local with their own."""
    summary = Summary(options)
    related = ("model__template", "model__preprocessing", "model__current_version__blob", "blob")
    members = job.model.members.select_related(*related)
    # Neighbours with one program share its process: weights follow each other into it, a set at a time.
    for _, group in groupby(members, key=lambda member: member.model_id):
        alike = list(group)
        outputs = _asked(job, alike, tensor, options.seed)
        for member, output in zip(alike, outputs, strict=True):
            weight = 1.0 if options.weighting == "equal" else member.weight
            summary.add(as_tensor(output), weight)
    return summary.answer()


def _asked(
    job: InferenceJob, members: Sequence[MeanMember], tensor: RawTensor, seed: int
) -> Sequence[RawTensor]:
    """What members of one program answer to an input that its preprocessing has made ready."""
    model = members[0].model
    with prepared_by(model, tensor) as (before, preparation):
        if len(members) == 1:
            with _program(job, model, members[0].weights, before) as program:
                return pool.predict(program, tensor, Plain(seed), preparation)
        plan = Drawn(lambda: (weights_of(member.weights) for member in members), seed)
        with _program(job, model, model.weights.blob, before) as program:
            return pool.predict(program, tensor, plan, preparation)


@contextmanager
def _program(
    job: InferenceJob, model: GlobalModel, weights: Blob, before: Program | None
) -> Iterator[Program]:
    """A model's uploaded program with these weights in it, as a file of its own while it is needed."""
    container = model.container
    with program_file(model, weights) as file:
        # A program that stays warm for one user must not tell his inputs to another.
        yield Program(file.path, file.etag, PROGRAMS[container], str(job.user_id), before)


def _store(job: InferenceJob, tensors: Sequence[RawTensor], notes: Sequence[str]) -> None:
    data, file = put(packed(tensors))
    try:
        job_finish(job=job, data=data, file=file, notes=notes)
    finally:
        if file is not None:
            blob_discard(blob=file)  # unless it has a row by now
