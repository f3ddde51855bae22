"""The static check of TorchScript: every operator that the archive's code names must be on the allow-list.

The code is tokenised as strictly as `torch.jit.save` writes it, and refused where it is written otherwise: what cannot
be told apart here might be read differently by torch. A name counts wherever it stands, called or not, because
TorchScript lets `o = ops.aten` and `(torch).save` be called later.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import Archive, open_archive
from fl_server_ai.containers.torch_archive.pickles import interpret
from fl_server_ai.containers.torch_archive.scripts import ForbiddenOperator
from fl_server_ai.sandbox.allowed_operators import ATEN
from fl_server_core.exceptions import BadContainer

NEXT = "rewrite the model with plain tensor operators and upload it again"
TOKEN = re.compile(
    r"""(?P<space>[ \n]++)
    |(?P<string>"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')
    |(?P<number>(?:\d+(?:\.\d*+)?|\.\d+)(?:[eE][+-]?\d+)?j?(?![\w]))
    |(?P<name>[A-Za-z_]\w*+)
    |(?P<mark>->|[-+*/%@&|^~<>=!]=?|[()\[\]{},:.;])""",
    re.VERBOSE | re.ASCII,
)
_PRIM = """NumToTensor Print RaiseException TupleIndex TupleUnpack EnumName EnumValue Uninitialized abs data
    device dtype index is_cpu is_cuda is_meta is_mkldnn is_mps is_nested is_quantized is_sparse
    is_sparse_csr is_xpu itemsize layout max min name nbytes rangelist requires_grad tolist type
    unchecked_cast unchecked_unwrap_optional"""
# Where they are installed; those that take tensors only.
_TORCHVISION = "nms roi_align roi_pool ps_roi_align ps_roi_pool deform_conv2d"
_QUANTIZED = """add add_relu mul mul_relu cat cat_relu relu6 leaky_relu sigmoid tanh softmax hardswish celu
    elu clamp batch_norm batch_norm1d batch_norm2d batch_norm3d batch_norm_relu batch_norm2d_relu
    batch_norm3d_relu layer_norm group_norm instance_norm"""
NAMESPACES = {
    "aten": ATEN,
    "prim": frozenset(_PRIM.split()),
    "torchvision": frozenset(_TORCHVISION.split()),
    "quantized": frozenset(_QUANTIZED.split()),
}
# They find attributes by texts; torch writes only `getattr(self, "0")`, for names like "0".
FORBIDDEN_NAMES = frozenset({"setattr", "hasattr", "delattr", "aten", "eval"})
# Operators that an attribute could stand for, whatever it is an attribute of.
_MEMBERS = "save load from_file set_data rpc_async rpc_sync rpc_remote read_file write_file"
FORBIDDEN_MEMBERS = frozenset(_MEMBERS.split())
MOST_CODE = 16 * 2**20  # bytes, of all files


def check_script(path: Path, limits: Limits) -> None:
    """Raise `ForbiddenOperator`, or `BadContainer` for an archive or code that torch doesn't write so."""
    with open_archive(path, limits) as archive:
        for name in ("data.pkl", "constants.pkl"):
            interpret(archive.read(name, limits.header_bytes))  # torch reads them after this
        sources = list(_sources(archive))
    for name, source in sources:
        check_source(name, source)


def _sources(archive: Archive) -> Iterator[tuple[str, str]]:
    left = MOST_CODE
    for name in archive.entries:
        if not name.startswith("code/") or name.endswith(".debug_pkl"):
            continue
        if not name.endswith(".py"):
            raise BadContainer(f"{name[:64]!r} has no place in a TorchScript archive")
        source = archive.read(name, left)
        left -= len(source)
        try:
            yield name, source.decode("ascii")
        except UnicodeDecodeError as error:
            raise BadContainer(
                f"{name[:64]!r} is not ASCII, as torch.jit.save writes it"
            ) from error


def check_source(file: str, source: str) -> None:
    """One file of serialised TorchScript."""
    words = list(_words(file, source))
    index = 0
    while index < len(words):
        if not words[index][0].isidentifier():
            index += 1
            continue
        chain = _chain(words, index)
        where = f"{file[:64]}, line {words[index][1]}"
        if chain == ["getattr"]:
            _check_text(words, index + 1, where)
        if index and words[index - 1][0] == ".":
            _check_members(chain, where)
        else:
            _check_chain(chain, where)
        index += 2 * len(chain) - 1


def _words(file: str, source: str) -> Iterator[tuple[str, int]]:
    """Tokens without spaces, each with its line; numbers as empty strings, texts with their quotes."""
    at, line, before = 0, 1, ""
    while at < len(source):
        found = TOKEN.match(source, at)
        if found is None:
            raise BadContainer(
                f"{file[:64]}, line {line}: torch.jit.save doesn't write {source[at : at + 8]!r}"
            )
        kind = found.lastgroup or ""
        if kind == "string" and before in {"name", "string"}:  # a prefix, or a tripled quote
            raise BadContainer(f"{file[:64]}, line {line}: torch.jit.save writes plain texts only")
        if kind != "space":
            yield ("" if kind == "number" else found.group()), line
        line += found.group().count("\n")
        before = kind
        at = found.end()


def _chain(words: Sequence[tuple[str, int]], index: int) -> list[str]:
    """The names from here that points join."""
    chain = [words[index][0]]
    while (
        index + 2 < len(words) and words[index + 1][0] == "." and words[index + 2][0].isidentifier()
    ):
        chain.append(words[index + 2][0])
        index += 2
    return chain


def _check_chain(chain: list[str], where: str) -> None:
    match chain:
        case ["torch", *rest]:
            _check_operator("aten", rest[:1], ".".join(chain[:2]), where)
            _check_members(rest[1:], where)
        case ["ops", *rest]:
            _check_operator(rest[0] if rest else "", rest[1:2], ".".join(chain[:3]), where)
            _check_members(rest[2:], where)
        case ["__torch__", "torch", "classes", *_]:
            _refuse(".".join(chain), where)
        case ["__torch__", *_]:
            pass  # the archive's own code, which is checked where it stands
        case [first, *rest]:
            if first in FORBIDDEN_NAMES:
                _refuse(first, where)
            _check_members(rest, where)


def _check_text(words: Sequence[tuple[str, int]], index: int, where: str) -> None:
    """The attribute that a `getattr` from here on finds, its last argument."""
    depth = 0
    for at in range(index, len(words)):
        depth += {"(": 1, ")": -1}.get(words[at][0], 0)
        if not depth:
            text = words[at - 1][0]
            if text[:1] in {'"', "'"} and "\\" not in text:
                _check_members([text[1:-1]], where)
                return
            break
    _refuse("getattr", where)


def _check_operator(namespace: str, names: list[str], told: str, where: str) -> None:
    if not names or names[0] not in NAMESPACES.get(namespace, frozenset()):
        _refuse(told, where)


def _check_members(names: list[str], where: str) -> None:
    for name in names:
        if name in FORBIDDEN_MEMBERS:
            _refuse(name, where)


def _refuse(operator: str, where: str) -> None:
    raise ForbiddenOperator(
        f"{operator[:80]} is no operator that a model may use here ({where}); {NEXT}",
        operator=operator[:80],
    )
