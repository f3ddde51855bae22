"""TorchScript archives whose code reaches files, or does not fit what their program holds."""

import functools
from collections.abc import Callable

from tests.ai.hostile.building import (
    BAD,
    BUILD,
    CODE,
    DICT,
    EMPTY,
    HEADER,
    HOSTILE,
    MANY,
    MARKER,
    NEWOBJ,
    NO_STATE,
    NONE,
    OPERATOR,
    TOO_LARGE,
    TRUE,
    UNKNOWN,
    UNSUPPORTED,
    Part,
    call,
    get,
    hostile,
    listed,
    named,
    number,
    numbers,
    path,
    program,
    put,
    saved_parts,
    script_object,
    script_parts,
    scripted,
    state_dict,
    tensor,
    text,
    zipped,
)  # fmt: skip

RETURN = "    return "


def saying(line: str) -> bytes:
    """The honest script with another line in `forward`; `FILE` in it is the marker in quotes."""
    return scripted(
        CODE.replace(RETURN, f"    {line.replace('FILE', repr(str(MARKER)))}\n{RETURN}")
    )


# torch runs each of these: they were tried. Those in the second table are not as torch writes code,
# which is reason enough to refuse them.
SAYS: dict[str, str] = {
    "torch.save": "torch.save(x, FILE)",
    "torch.from_file": "_0 = torch.from_file(FILE, True, 4, dtype=6)",
    "torch.load": "_0 = torch.load(FILE)",
    "ops.aten.save": "_0 = ops.aten.save(x, FILE)",
    "ops.aten.from_file": "_0 = ops.aten.from_file(FILE, True, 4)",
    "ops.aten.autograd.save": "_0 = ops.aten.autograd.save(x, FILE)",
    "ops.debugprims.load_tensor": "_0 = ops.debugprims.load_tensor(FILE, [4], [1], dtype=6)",
    "torch.autograd.save": "_0 = torch.autograd.save(x, FILE)",
    "torch.autograd under another name, .save": "t = torch.autograd\n    _0 = t.save(x, FILE)",
    "getattr of torch.autograd and save": '_0 = getattr(torch.autograd, "save")(x, FILE)',
    "torch.save with spaces": "torch  .\t save  (x, FILE)",
    "torch.save with a form feed": "torch.\fsave(x, FILE)",
    "torch.save on two lines": "_0 = torch.\\\nsave(x, FILE)",
    "torch.save on two lines in brackets": "_0 = (torch.\n  save(x, FILE))",
    "ops.aten.save with spaces": "_0 = ops . aten . save(x, FILE)",
    "torch in brackets, .save": "_0 = (torch).save(x, FILE)",
    "torch under another name, .save": "t = torch\n    _0 = t.save(x, FILE)",
    "aten under another name, .save": "t = ops.aten\n    _0 = t.save(x, FILE)",
    "getattr of torch and save": '_0 = getattr(torch, "save")(x, FILE)',
    "getattr of ops.aten and save": '_0 = getattr(ops.aten, "save")(x, FILE)',
}
HIDES: dict[str, str] = {
    "around a comment": "_0 = (torch. # a comment\n save(x, FILE))",
    "after a comment": "_0 = (torch # a comment\n .save(x, FILE))",
    "between strings of three quotes": '_0 = ("""a"b\'""", ops.aten.save(x, FILE), \'c\')',
    "after a string of three quotes": '_0 = """a"b\'"""\n    torch.save(x, FILE)',
    "after a quote in a comment": "# it's\n    torch.save(x, FILE)  # isn't it",
}
for _name, _line in SAYS.items():
    hostile(f"a script that says {_name}", OPERATOR)(functools.partial(saying, _line))
for _name, _line in HIDES.items():
    hostile(f"a script that says torch.save {_name}", OPERATOR, BAD)(
        functools.partial(saying, _line)
    )

# torch takes `w` for a parameter in each of these; a reader that does not would hide it.
DECLARED = '__parameters__ = ["w", ]'
HIDDEN: dict[str, str] = {
    "in single quotes": CODE.replace('"w"', "'w'"),
    "after a tab": CODE.replace("__parameters__ =", "__parameters__\t="),
    "on two lines": CODE.replace("__parameters__ =", "__parameters__ \\\n="),
    "after a bracket in a comment": CODE.replace('["w", ]', '[ # ]\n "w"]'),
    "after a class in a string": (
        CODE.replace(f"  {DECLARED}\n", "").replace(
            RETURN, f'    _0 = """\nclass A(Module):\n"""\n{RETURN}'
        )
        + f"  {DECLARED}\n"
    ),
}
for _name, _code in HIDDEN.items():
    hostile(f"a script that declares its parameter {_name}", BAD)(
        functools.partial(scripted, _code)
    )

RECURSIVE = CODE.replace("  training", "  me : __torch__.Net\n  training")


def _itself() -> bytes:
    start = put(path("__torch__", "Net") + EMPTY + NEWOBJ, 0)
    return start + named({"w": tensor(), "training": TRUE, "me": get(0)}) + BUILD


def _chain(levels: int, times: int) -> bytes:
    value = put(script_object(), 0)
    for level in range(1, levels):
        held = {"w": NONE, **{f"m{i}": get(level - 1) for i in range(times)}}
        value += b"0" + put(script_object(held), level)
    return value


def _often() -> bytes:
    start = put(path("__torch__", "Net") + EMPTY + NEWOBJ, 0)
    held = {f"{i:030d}": get(0) for i in range(3_000)}
    return start + named({"w": NONE, **held}) + BUILD


FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "of a class without code": (
        lambda: scripted(value=script_object(cls="Other")), (NO_STATE, BAD),
    ),
    "with a child of a class without code": (
        # A child that is no module of the code is an attribute; torch can't load it.
        lambda: zipped(*(p for p in script_parts() if "code" not in str(p.name))), (NO_STATE, BAD),
    ),
    "whose parameter is a number": (
        lambda: scripted(value=script_object({"w": number(1)})), (BAD, NO_STATE),
    ),
    "whose parameter is missing": (lambda: scripted(value=script_object({"training": TRUE})), (BAD,)),
    "whose parameter is a list of tensors": (
        lambda: scripted(value=script_object({"w": listed(tensor())})), (BAD,),
    ),
    "whose parameter is too long": (
        lambda: scripted(value=script_object({"w": tensor(size=numbers(5))})), (BAD,),
    ),
    "whose parameter is declared twice": (
        lambda: scripted(CODE.replace('"w", ]', '"w", "w", ]')), (BAD,),
    ),
    "that holds itself": (lambda: scripted(RECURSIVE, _itself()), (BAD,)),
    "that holds itself under three thousand names": (
        lambda: scripted(RECURSIVE, _often()), (BAD, HOSTILE),
    ),
    "of modules that multiply": (lambda: scripted(value=_chain(20, 10)), (BAD, MANY)),
    "a hundred modules deep": (lambda: scripted(value=_chain(100, 1)), (BAD,)),
    "that is a state dict": (lambda: scripted(value=state_dict()), (NO_STATE,)),
    "that is a number": (lambda: scripted(value=number(1)), (NO_STATE,)),
    "whose state is a list": (
        lambda: scripted(value=path("__torch__", "Net") + EMPTY + NEWOBJ + listed(tensor()) + BUILD),
        (NO_STATE,),
    ),
    "without a state": (lambda: scripted(value=path("__torch__", "Net") + EMPTY + NEWOBJ), (NO_STATE,)),
    "that calls os.system": (
        lambda: scripted(
            value=script_object({"w": tensor(), "a": call(path("os", "system"), text("true"))})
        ), (HOSTILE,),
    ),
    "that names os.system as its class": (
        lambda: scripted(value=path("os", "system") + EMPTY + NEWOBJ + DICT + BUILD), (HOSTILE,),
    ),
    "whose code begins with bytes that are no text": (
        # No class is found behind them, by torch neither.
        lambda: scripted(b"\xff\xfe" + CODE.encode()), (BAD, NO_STATE),
    ),
    "whose code has twenty megabytes": (
        lambda: scripted(CODE * (20_000_000 // len(CODE))), (TOO_LARGE, HEADER),
    ),
    "whose code has twelve megabytes in many files": (
        lambda: zipped(
            *script_parts(),
            *(
                Part(f"net/code/x{i}.py", CODE.encode() * (10**6 // len(CODE)), deflate=True)
                for i in range(12)
            ),
        ), (TOO_LARGE, HEADER),
    ),
    "whose code has a string of seven megabytes": (
        lambda: scripted(CODE + '_0 = "' + "a" * 7_000_000 + '"\ntorch.save(_0, "x")'), (OPERATOR,),
    ),
    "whose code has seven megabytes of quotes": (
        lambda: scripted(CODE + '"" ' * 2_300_000 + "\ntorch.save(_0, 1)"), (OPERATOR,),
    ),
    "whose code has seven megabytes of backslashes": (
        lambda: scripted(CODE + '"' + "\\" * 7_000_000 + "\ntorch.save(_0, 1)"), (OPERATOR, BAD),
    ),
    "whose code says torch two megabytes long": (
        lambda: scripted(CODE + "torch . " * (2_000_000 // 8) + "save"), (OPERATOR,),
    ),
    "whose code has four hundred thousand classes": (
        lambda: scripted(CODE + "class A(Module):\n" * 400_000 + "torch.save(x, y)"), (OPERATOR, BAD),
    ),
    "of the format before torch 1.4": (
        lambda: zipped(*script_parts(), Part("net/model.json", b"{}")), (UNKNOWN,),
    ),
    "of packed weights": (
        lambda: scripted(
            value=script_object({
                "w": tensor(),
                "packed": path("__torch__.torch.classes.quantized", "LinearPackedParamsBase")
                + EMPTY + NEWOBJ + DICT + BUILD,
            })
        ), (UNSUPPORTED,),
    ),
    "without data.pkl, but with constants.pkl": (
        lambda: zipped(
            *saved_parts(program(state_dict()))[1:], Part("archive/constants.pkl", program(EMPTY))
        ), (BAD,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in FILES.items():
    hostile(f"a script {_name}", *_codes)(_build)
