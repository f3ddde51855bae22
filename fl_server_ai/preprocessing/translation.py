"""torchvision's pickled v2 transforms as a pipeline. What the pickle says is read as inert records, never carried out."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import open_archive
from fl_server_ai.containers.torch_archive.pickles import interpret
from fl_server_ai.containers.torch_archive.records import Global, Made, items_of, kind_of, pairs_of
from fl_server_ai.preprocessing.pipeline import EXAMPLE, MOST_STEPS, Pipeline, parse
from fl_server_core.exceptions import Invalid, TooLarge

PACKAGE = "torchvision.transforms."
V1 = ("torchvision.transforms.transforms.", "torchvision.transforms.autoaugment.")
V2 = f"{PACKAGE}v2."
SEQUENTIAL = "torch.nn.modules.container.Sequential"
# With the attribute that holds what is in them.
CONTAINERS = {f"{V2}_container.Compose": "transforms", SEQUENTIAL: "_modules"}
IMAGES = frozenset({"torchvision.tv_tensors._image.Image", "torch.Tensor", "torch._tensor.Tensor"})
MOST_VISITED = 1_000  # transforms and containers, repeated ones each time

Attributes = Mapping[str, Any]
Entries = list[dict[str, Any]]


def transforms_in(pickle: bytes) -> Made | None:
    """What the pickle holds, if it is a transform of torchvision's or a container of them."""
    return _transform(interpret(pickle))


def transforms_in_archive(path: Path, limits: Limits) -> Made | None:
    """The same of what `torch.save` has written."""
    with open_archive(path, limits) as archive:
        return transforms_in(archive.read("data.pkl", limits.pickle_bytes))


def read_pickle(path: Path, limits: Limits) -> bytes:
    """A pickle alone in its file, whole; `TooLarge` beyond what a program in an archive may have."""
    size = path.stat().st_size
    if size > limits.pickle_bytes:
        raise TooLarge(f"{size:,} bytes of pickle; {limits.pickle_bytes:,} are allowed")
    return path.read_bytes()


def translated(transforms: Made) -> Pipeline:
    """The same as a pipeline; `Invalid` with TRANSFORMS_V1, UNKNOWN_TRANSFORM or what `parse` says."""
    entries: Entries = []
    for pointer, leaf in _leaves(transforms):
        entries += _steps(leaf, pointer)
    return parse({"steps": entries})


def _transform(value: Any) -> Made | None:
    """The value, if what comes first in it is torchvision's."""
    first = value
    for _ in range(MOST_VISITED):
        if not isinstance(first, Made):
            return None
        if first.function.path.startswith(PACKAGE):
            return value  # type: ignore[no-any-return]
        if first.function.path != SEQUENTIAL:
            return None
        members = _members(first)
        if not members:
            return None
        first = members[0]
    return None


def _members(container: Made) -> list[Any] | None:
    found = _attributes(container).get(CONTAINERS[container.function.path])
    pairs = pairs_of(found)
    return [member for _, member in pairs] if pairs is not None else items_of(found)


def _leaves(root: Any) -> Iterator[tuple[str, Any]]:
    """Every transform in order, with a pointer to it. A hostile file nests and repeats without end."""
    stack: list[tuple[str, Any]] = [("/transforms", root)]
    for _ in range(MOST_VISITED):
        if not stack:
            return
        pointer, value = stack.pop()
        if not isinstance(value, Made) or value.function.path not in CONTAINERS:
            yield pointer, value
            continue
        members = _members(value)
        if members is None or len(members) > MOST_STEPS:
            path = value.function.path
            raise _refused(pointer, f"{path} is not filled as torch fills it")
        stack += [(f"{pointer}/{i}", member) for i, member in enumerate(members)][::-1]
    if stack:
        raise _refused("/transforms", f"more than {MOST_VISITED} transforms")


def _steps(value: Any, pointer: str) -> Entries:
    path = value.function.path if isinstance(value, Made) else ""
    if path.startswith(V1):
        name = path.rpartition(".")[2][:64]
        said = (
            f"{name} is of torchvision's old transforms, which guess what their input is; import "
            "torchvision.transforms.v2 as transforms and save that Compose, with ToImage() and "
            f"ToDtype(torch.float32, scale=True) for ToTensor(), or write it as JSON: {EXAMPLE}"
        )
        raise Invalid(said, code="TRANSFORMS_V1", errors=_errors(pointer, said))
    if path not in TRANSFORMS:
        known = ", ".join(sorted({known.rpartition(".")[2] for known in TRANSFORMS}))
        name = (path or kind_of(value)).removeprefix(V2)[:80]
        raise _refused(
            pointer,
            f"{name} can't be translated: there are {known}; leave out what is for training only",
        )
    return TRANSFORMS[path](_attributes(value), pointer)


def _resize(of: Attributes, pointer: str) -> Entries:
    entry = {
        "step": "resize",
        "size": plain(of.get("size")),
        "interpolation": _interpolation(of.get("interpolation")),
        "antialias": bool(of.get("antialias")),
        "max_size": of.get("max_size"),
    }
    return [entry]


def _center_crop(of: Attributes, pointer: str) -> Entries:
    return [{"step": "center_crop", "size": plain(of.get("size"))}]


def _grayscale(of: Attributes, pointer: str) -> Entries:
    return [{"step": "grayscale", "channels": of.get("num_output_channels")}]


def _normalize(of: Attributes, pointer: str) -> Entries:
    return [{"step": "normalize", "mean": plain(of.get("mean")), "std": plain(of.get("std"))}]


def _to_dtype(of: Attributes, pointer: str) -> Entries:
    dtype = of.get("dtype")
    pairs = pairs_of(dtype)
    if pairs is not None:  # by kind of input, of which there are only images here
        named = {key.path if isinstance(key, Global) else key: v for key, v in pairs if _named(key)}
        dtype = next((named[key] for key in named if key in IMAGES), named.get("others"))
        if dtype is None:  # as torchvision: they stay as they are
            return []
    return [_cast(dtype, scale=of.get("scale") is True, pointer=pointer)]


def _convert(of: Attributes, pointer: str) -> Entries:
    return [_cast(of.get("dtype"), scale=True, pointer=pointer)]


def _classification(of: Attributes, pointer: str) -> Entries:
    """`weights.transforms()` of torchvision's own classifiers."""
    resize = {
        "size": of.get("resize_size"),
        **{n: of.get(n) for n in ("interpolation", "antialias")},
    }
    return [
        *_resize(resize, pointer),
        *_center_crop({"size": of.get("crop_size")}, pointer),
        {"step": "cast", "dtype": "float32", "scale": True},
        *_normalize(of, pointer),
    ]


def _simple(*names: str) -> Callable[[Attributes, str], Entries]:
    return lambda of, pointer: [{"step": name} for name in names]


TRANSFORMS: Mapping[str, Callable[[Attributes, str], Entries]] = {
    f"{V2}_type_conversion.ToImage": _simple("to_image"),
    f"{V2}_type_conversion.PILToTensor": _simple("to_image"),
    f"{V2}_type_conversion.ToPureTensor": _simple(),
    f"{V2}_deprecated.ToTensor": _simple("to_tensor"),
    f"{V2}_misc.Identity": _simple(),
    f"{V2}_misc.ToDtype": _to_dtype,
    f"{V2}_misc.ConvertImageDtype": _convert,
    f"{V2}_misc.Normalize": _normalize,
    f"{V2}_geometry.Resize": _resize,
    f"{V2}_geometry.CenterCrop": _center_crop,
    f"{V2}_color.Grayscale": _grayscale,
    f"{V2}_color.RGB": _simple("rgb"),
    f"{PACKAGE}_presets.ImageClassification": _classification,
}


def _attributes(value: Made) -> dict[str, Any]:
    """An object's attributes by name; the last of two alike counts, as in Python."""
    return {key: found for key, found in pairs_of(value.state) or [] if type(key) is str}


def plain(value: Any) -> Any:
    """A list of numbers as such; a number as it is. `parse` refuses the rest."""
    items = items_of(value)
    return list(items) if items is not None else value


def _interpolation(value: Any) -> Any:
    """An enum's member is pickled as a call of its class, or its text alone."""
    if isinstance(value, Made) and value.function.path.endswith(".InterpolationMode"):
        value = value.arguments[0] if len(value.arguments) == 1 else None
    return value if type(value) is str else kind_of(value)


def _cast(dtype: Any, *, scale: bool, pointer: str) -> dict[str, Any]:
    if not isinstance(dtype, Global) or dtype.module != "torch":
        raise _refused(pointer, f"the dtype is {kind_of(dtype)}, none of torch's")
    return {"step": "cast", "dtype": dtype.name, "scale": scale}


def _named(key: Any) -> bool:
    return isinstance(key, Global) or type(key) is str


def _refused(pointer: str, detail: str) -> Invalid:
    return Invalid(detail, code="UNKNOWN_TRANSFORM", errors=_errors(pointer, detail))


def _errors(pointer: str, detail: str) -> list[dict[str, str]]:
    return [{"pointer": pointer[:200], "code": "invalid", "detail": detail}]
