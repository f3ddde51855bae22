"""From a SWAG round's stored moments to the round's own, tensor by tensor."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical
from fl_server_ai.services.training_options import TrainerOptions, swag_variance
from fl_server_ai.trainer.deviations import combine_deviations
from fl_server_ai.uncertainty.moments import Moments, combine_moments
from fl_server_core.exceptions import AggregationException, DomainError
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import RoundPhase
from fl_server_core.models import Blob, Round, SwagMoments, TrainerEvent, Training
from fl_server_core.services.blobs import blob_discard, blob_store
from fl_server_core.services.events import event_held
from fl_server_core.services.moments import moments_publish
from fl_server_core.services.trainings import training_locked
from fl_server_core.storage import local_path, staging_path


def combine_round(
    training: Training, round: Round, options: TrainerOptions, work: TrainerEvent | None
) -> None:
    """Combine the moments that participants sent and store the result; a round that has one stays as it is."""
    sent = list(
        SwagMoments.objects.filter(round=round, owner__isnull=False, first__isnull=False)
        .select_related("first", "second", "deviations")
        .order_by("owner_id")
    )
    if not sent:
        raise AggregationException(f"round {round.number} has no moments")
    paths = staging_path(".first"), staging_path(".second")
    variance = swag_variance(training)
    blobs: list[Blob] = []
    try:
        blobs.extend(_write(paths[index], sent, variance, index) for index in range(2))
        deviations, notes = combine_deviations(sent, rank=options.swag_rank, variance=variance)
    except DomainError as error:
        _discard(blobs)
        raise AggregationException(error.detail) from error
    except BaseException:
        _discard(blobs)
        raise
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    blobs += [deviations] if deviations is not None else []
    try:
        reached("moments.written")
        with committing("moments.publish"):
            training_locked(training.pk)
            current = Round.objects.select_related("training").get(pk=round.pk)
            held = work is None or event_held(event=work)
            if current.phase == RoundPhase.SWAG and held:
                moments_publish(
                    round=current,
                    sample_size=sum(one.sample_size for one in sent),
                    first=blobs[0],
                    second=blobs[1],
                    deviations=deviations,
                    notes=notes,
                    delete=options.delete_local_models_after_aggregation,
                )
    finally:
        _discard(blobs)


def _discard(blobs: list[Blob]) -> None:
    for blob in blobs:
        blob_discard(blob=blob)  # unless it was published


def _write(target: Path, sent: list[SwagMoments], variance: str, index: int) -> Blob:
    """The combined first (0) or second (1) moments as a stored file, float64."""
    with ExitStack() as stack:
        clients = [_Client(one, stack) for one in sent]
        layout = clients[0].layout()

        def blocks(name: str) -> Iterator[bytes]:
            pairs = [client.moments(name) for client in clients]
            ((_, *both),) = combine_moments(pairs, variance)  # type: ignore[arg-type]
            yield both[index].contiguous().numpy().tobytes()

        digest = write_canonical(target, layout, blocks)
    size = target.stat().st_size
    return blob_store(source=target, digest=digest, size=size)


class _Client:
    """One participant's files, read tensor by tensor."""

    def __init__(self, sent: SwagMoments, stack: ExitStack) -> None:
        if sent.first is None or sent.second is None:
            raise AggregationException(f"moments {sent.pk} have lost their files")
        self.weight = float(sent.sample_size)
        self.path = stack.enter_context(local_path(sent.second))
        self.first = stack.enter_context(
            safe_open(stack.enter_context(local_path(sent.first)), "pt")
        )
        self.second = stack.enter_context(safe_open(self.path, "pt"))

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(info.name, "F64", info.shape) for info in read_manifest(self.path).tensors]

    def moments(self, name: str) -> Moments:
        if name not in self.second.keys():  # noqa: SIM118 - a file, not a dict
            raise AggregationException(f"participants sent moments of different tensors: {name}")
        first: Mapping[str, Tensor] = {name: self.first.get_tensor(name)}
        return Moments(self.weight, first, {name: self.second.get_tensor(name)})
