"""Which tensors of a file are weights, which are extras, and which belong to an encoding.

`extra.<namespace>.<name>` is an extra if the strategy declares it. `extra.enc.*` is kept for encodings, the
namespaces `fl` and `server` for what may come. A tensor that the model itself has is always a weight.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fl_server_ai.aggregation import Extra
from fl_server_ai.aggregation.strategy import RESERVED
from fl_server_ai.containers import Manifest, TensorInfo
from fl_server_core.exceptions import Unusable

PREFIX = "extra."
CODING = "extra.enc."


@dataclass
class Parts:
    """A file's tensors by what they are; `tensors` of an extra by the model's names, `coding` by the rest."""

    weights: dict[str, TensorInfo] = field(default_factory=dict)
    numbers: dict[str, TensorInfo] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    coding: dict[str, TensorInfo] = field(default_factory=dict)


def parts_of(
    manifest: Manifest, model: Collection[str], extras: Collection[Extra], *, coded: bool
) -> Parts:
    """Sort the names; `coded` says whether the file's encoding needs tensors of its own."""
    parts = Parts()
    by_name = {extra.name: extra for extra in extras}
    for info in manifest.tensors:
        if info.name in model or not info.name.startswith(PREFIX):
            parts.weights[info.name] = info
        elif coded and info.name.startswith(CODING):
            parts.coding[info.name.removeprefix(CODING)] = info
        else:
            _place(parts, info, by_name)
    return parts


def _place(parts: Parts, info: TensorInfo, extras: Mapping[str, Extra]) -> None:
    namespace, _, rest = info.name.removeprefix(PREFIX).partition(".")
    if namespace in RESERVED:
        raise Unusable(
            f"{info.name!r}: the namespace {namespace!r} is reserved",
            code="EXTRA_RESERVED",
            tensor=info.name,
        )
    name, _, tensor = rest.partition(".")
    extra = extras.get(f"{namespace}.{name}")
    if extra is None or extra.per_tensor != bool(tensor):
        known = ", ".join(_pattern(one) for one in extras.values()) or "none"
        raise Unusable(
            f"{info.name!r} is no extra that this training wants; there are {known}",
            code="EXTRA_UNKNOWN",
            tensor=info.name,
        )
    if extra.per_tensor:
        parts.tensors.setdefault(extra.name, {})[tensor] = info
    else:
        parts.numbers[extra.name] = info


def _pattern(extra: Extra) -> str:
    return f"{PREFIX}{extra.name}{'.<tensor>' if extra.per_tensor else ''}"


def check_model_names(model: Collection[str], extras: Collection[Extra]) -> None:
    """Refuse a model whose own tensors have names that its strategy needs for something else."""
    for name in model:
        for extra in extras:
            taken = f"{PREFIX}{extra.name}"
            if name == taken or (extra.per_tensor and name.startswith(f"{taken}.")):
                raise Unusable(
                    f"the model has a tensor {name!r}, a name that this strategy needs for what "
                    "clients send beside the weights; rename it",
                    code="EXTRA_COLLISION",
                    tensor=name,
                )
