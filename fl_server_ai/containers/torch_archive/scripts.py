"""TorchScript's own code, as far as it tells what is a parameter; it is searched, never compiled or run."""

import re
from typing import Any

from fl_server_ai.containers.torch_archive.archive import Archive
from fl_server_ai.containers.torch_archive.names import Members, NotAStateDict, entries
from fl_server_ai.containers.torch_archive.records import Made, kind_of
from fl_server_ai.containers.torch_archive.tensors import UnsupportedTensor, is_tensor
from fl_server_core.exceptions import BadContainer

STRING = re.compile(r"""("(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')""")
CLASS = re.compile(r"^class[ ]+(\w+)\((\w+)\):", re.MULTILINE)
DECLARED = re.compile(r"^[ ]+__(?:parameters|buffers)__[ ]*=[ ]*\[([^\[\]]*+)\]", re.MULTILINE)
NAME = re.compile(r'"([^"\\\n]*+)"')
GAP = r"[\s\\]*"
# What reads or writes files; TorchScript knows these operators by both names.
FORBIDDEN = re.compile(
    rf"\b(?:torch|aten){GAP}\.{GAP}(save|load|from_file|_save|_load)\b|\bops{GAP}\.{GAP}aten{GAP}\.{GAP}(save|from_file)\b"
)


class ForbiddenOperator(BadContainer):
    """The program in the archive would reach files when it runs."""

    code = "FORBIDDEN_OPERATOR"


class Classes:
    """The classes that the archive's code declares, with the names of their parameters and buffers."""

    def __init__(self, archive: Archive) -> None:
        self.tensors: dict[str, tuple[str, ...]] = {}
        left = archive.limits.header_bytes
        for name in archive.entries:
            if name.startswith("code/") and name.endswith(".py"):
                source = archive.read(name, left)
                left -= len(source)
                module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
                self._read(module, source)

    def _read(self, module: str, source: bytes) -> None:
        try:
            text = source.decode()
        except UnicodeDecodeError as error:
            raise BadContainer(f"the code of {module[:64]} is not UTF-8") from error
        found = FORBIDDEN.search(STRING.sub('""', text))
        if found:
            raise ForbiddenOperator(
                f"the program calls {found.group()[:40]!r}, which reads or writes files; "
                "a model needs no such operator"
            )
        heads = list(CLASS.finditer(text))
        ends = [head.start() for head in heads[1:]] + [len(text)]
        for head, end in zip(heads, ends, strict=False):
            body = text[head.end() : end]
            if head.group(2) == "Module":
                names = [
                    name
                    for declared in DECLARED.finditer(body)
                    for name in NAME.findall(declared.group(1))
                ]
                self.tensors[f"{module}.{head.group(1)}"] = tuple(names)

    def members(self, module: Made) -> Members:
        """Of a script module: the tensors that its class declares, and its attributes that are modules."""
        declared = self.tensors.get(module.function.path)
        if declared is None:
            raise BadContainer(f"the archive has no code for {kind_of(module)}")
        held = dict(entries(module.state, kind_of(module)))
        tensors = []
        for name in declared:
            if name not in held or not (held[name] is None or is_tensor(held[name])):
                raise BadContainer(f"{kind_of(module)} declares {name[:64]!r}, which is no tensor")
            if held[name] is not None:
                tensors.append((name, held[name]))
        children = []
        for name, value in held.items():
            if _packed(value):
                raise UnsupportedTensor(f"{name[:64]!r} is packed ({kind_of(value)})")
            if isinstance(value, Made) and value.function.path in self.tensors:
                children.append((name, value))
        return tensors, children

    def root(self, value: Any) -> Made:
        """The module that the archive holds."""
        if not isinstance(value, Made) or value.function.path not in self.tensors:
            raise NotAStateDict(f"the archive holds {kind_of(value)}, no script module")
        return value


def _packed(value: Any) -> bool:
    return isinstance(value, Made) and value.function.module.startswith("__torch__.torch.classes")
