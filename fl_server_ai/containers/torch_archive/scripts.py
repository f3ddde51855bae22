"""TorchScript's own code, as far as it tells what is a parameter; it is searched, never compiled or run."""

import re
from typing import Any

from fl_server_ai.containers.torch_archive.archive import Archive
from fl_server_ai.containers.torch_archive.names import Members, NotAStateDict, entries
from fl_server_ai.containers.torch_archive.records import Made, kind_of
from fl_server_ai.containers.torch_archive.tensors import UnsupportedTensor, is_tensor
from fl_server_core.exceptions import BadContainer

STRING = r"""\"(?!\"\")(?:[^"\\\n]|\\.)*+\"|'(?!'')(?:[^'\\\n]|\\.)*+'"""
GAP = r"[\s\\]*"
OPERATORS = "prim|aten|quantized|prepacked|torchvision|torchaudio|mkldnn|profiler"
FILES = "save|load|from_file|_save|_load|load_tensor"
# Beside texts: comments and texts over several lines, which torch never writes; operators that read or
# write files; and "torch", "ops.aten" or "torch.autograd" alone, which could become another name for all of them.
PROGRAM = re.compile(
    rf"{STRING}|(?P<odd>[#\"'])"
    rf"|(?P<call>\b(?:torch|aten){GAP}\.{GAP}(?:autograd|{FILES})\b"
    rf"|\bops{GAP}\.{GAP}(?!(?:{OPERATORS})\b)\w+|\bops{GAP}\.{GAP}\w++(?!{GAP}\.)"
    rf"|\bops{GAP}\.{GAP}\w+{GAP}\.{GAP}(?:autograd|{FILES})\b"
    rf"|(?<![\w.])(?:torch|aten|ops)\b(?!{GAP}\.)(?![ ]*(?::|=(?!=))))",
    re.DOTALL,
)
CLASS = re.compile(r"^class[ ]+(\w+)\((\w+)\):", re.MULTILINE)
DECLARED = re.compile(r"^[ ]+(__parameters__|__buffers__)[ ]*=[ ]*\[([^\[\]]*+)\]", re.MULTILINE)
NAME = re.compile(r'"([^"\\\n]*+)"')


class ForbiddenOperator(BadContainer):
    """The program in the archive would reach files when it runs."""

    code = "FORBIDDEN_OPERATOR"


class Classes:
    """The classes that the archive's code declares, with the names of their parameters and buffers."""

    def __init__(self, archive: Archive) -> None:
        self.tensors: dict[str, tuple[str, ...]] = {}
        left = archive.limits.code_bytes
        for name in archive.entries:
            if name.startswith("code/") and name.endswith(".py"):
                source = archive.read(name, left)
                left -= len(source)
                module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
                self._read(module, source.decode("latin-1"))  # what is looked for is ASCII

    def _read(self, module: str, text: str) -> None:
        for found in PROGRAM.finditer(text):
            if found["odd"]:
                raise BadContainer(f"the code of {module[:64]} is not written as torch writes it")
            if found["call"]:
                raise ForbiddenOperator(
                    f"the program says {found['call'][:40]!r}, which may read or write files; "
                    "a model needs no such operator"
                )
        heads = list(CLASS.finditer(text))
        ends = [head.start() for head in heads[1:]] + [len(text)]
        for head, end in zip(heads, ends, strict=False):
            if head[2] == "Module":
                self.tensors[f"{module}.{head[1]}"] = _declared(text, head.end(), end)

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


def _declared(text: str, start: int, end: int) -> tuple[str, ...]:
    """The names of parameters and buffers of the class whose body lies there."""
    found = {match[1]: NAME.findall(match[2]) for match in DECLARED.finditer(text, start, end)}
    lists = "".join(match[2] for match in DECLARED.finditer(text, start, end))
    if NAME.sub("", lists).strip(", \n"):
        raise BadContainer("the code declares its tensors in a way that torch does not write")
    for word in ("__parameters__", "__buffers__"):
        if text.count(word, start, end) != (word in found):
            raise BadContainer("the code declares its tensors in a way that torch does not write")
    return tuple(name for names in found.values() for name in names)
