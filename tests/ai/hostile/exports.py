"""torch.export archives (.pt2) whose entries torch would unpickle, or whose tables lie about their tensors."""

import json
from collections.abc import Callable
from typing import Any

from tests.ai.hostile.building import (
    BAD,
    FOUR,
    HEADER,
    HONEST,
    MANY,
    TOO_LARGE,
    TOUCH,
    UNKNOWN,
    UNSUPPORTED,
    Part,
    call,
    hostile,
    path,
    program,
    text,
    zipped,
)  # fmt: skip

PICKLED = "PICKLED_ENTRY"
ARMED = program(call(path("os", "system"), text(TOUCH)))
GRAPH = {
    "graph_module": {
        "graph": {},
        "signature": {
            "input_specs": [{"parameter": {"arg": {"name": "w"}, "parameter_name": "w"}}]
        },
    },
    "guards_code": [f"__import__('os').system({TOUCH!r})"],
}
HUGE = 2**40


def described(**changes: Any) -> dict[str, Any]:
    """The honest description of the only tensor, with these lies about it or its metadata."""
    meta = {
        "dtype": 7, "sizes": [{"as_int": 4}], "requires_grad": True,
        "device": {"type": "cpu", "index": None}, "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip
    payload: dict[str, Any] = {"path_name": "weight_0", "is_param": True, "use_pickle": False}
    payload |= {key: changes[key] for key in payload.keys() & changes.keys()}
    meta |= {key: changes[key] for key in meta.keys() & changes.keys()}
    return payload | {"tensor_meta": meta}


def table(*tensors: tuple[str, Any]) -> bytes:
    """As JSON; names may occur twice."""
    entries = (f"{json.dumps(name)}: {json.dumps(told)}" for name, told in tensors)
    return f'{{"config": {{{", ".join(entries)}}}}}'.encode()


def parts(weights: bytes | None = None, constants: bytes | None = None) -> list[Part]:
    tables = {
        "weights/model_weights": table(("w", described())) if weights is None else weights,
        "constants/model_constants": table() if constants is None else constants,
    }
    return [
        Part("net/data/weights/weight_0", FOUR),
        *(Part(f"net/data/{name}_config.json", data) for name, data in tables.items()),
        Part("net/models/model.json", json.dumps(GRAPH).encode()),
        Part("net/data/sample_inputs/model.pt", ARMED),  # torch's own writer puts a pickle there
        Part("net/archive_format", b"pt2"),
        Part("net/archive_version", b"0"),
        Part("net/byteorder", b"little"),
    ]


def lying(**changes: Any) -> bytes:
    return zipped(*parts(table(("w", described(**changes)))))


def without(*names: str) -> bytes:
    return zipped(*(part for part in parts() if part.name not in {f"net/{n}" for n in names}))


def more(name: str, data: bytes = ARMED) -> bytes:
    return zipped(*parts(), Part(f"net/{name}", data))


HONEST["export"] = lambda: zipped(*parts())

FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    # Entries that torch would unpickle, run or prefer.
    "whose weights are a pickle": (lambda: lying(use_pickle=True), (PICKLED,)),
    "whose weights are perhaps a pickle": (lambda: lying(use_pickle=None), (PICKLED,)),
    "whose constants are a pickle": (
        lambda: zipped(
            *parts(constants=table(("c", described(use_pickle=True, path_name="tensor_0")))),
            Part("net/data/constants/tensor_0", ARMED),
        ), (PICKLED,),
    ),
    "with an object of TorchScript": (lambda: more("data/constants/custom_obj_0"), (PICKLED,)),
    "with an opaque object": (lambda: more("data/constants/opaque_obj_0"), (PICKLED,)),
    "whose constant is an object": (
        lambda: zipped(*parts(constants=table(("c", described(path_name="opaque_obj_0"))))), (PICKLED,),
    ),
    "with pickled weights of an older layout": (lambda: more("data/weights/model.pt"), (PICKLED,)),
    "with pickled constants of an older layout": (lambda: more("data/constants/model.pt"), (PICKLED,)),
    "with compiled code": (lambda: more("data/aotinductor/model/model.so", b"\x7fELF"), (PICKLED,)),
    "with a second graph": (lambda: more("models/other.json", b"{}"), (PICKLED,)),
    "with a program of torch.save": (lambda: more("data.pkl"), (PICKLED,)),
    "with the constants of a script": (lambda: more("constants.pkl"), (PICKLED,)),
    "with a graph in capitals": (lambda: more("MODELS/MODEL.JSON", b"{}"), (BAD,)),
    "with a pickle in capitals": (lambda: more("data/weights/WEIGHT_1"), (PICKLED,)),
    "whose tensor lies in the graph": (lambda: lying(path_name="../../models/model.json"), (PICKLED,)),
    "whose tensor lies in the file system": (lambda: lying(path_name="/etc/passwd"), (PICKLED,)),
    "whose tensor lies in a number": (lambda: lying(path_name=0), (PICKLED,)),
    "whose tensor lies nowhere": (lambda: lying(path_name="weight_7"), (BAD,)),
    # Claims about tensors.
    "of a tensor of four terabytes": (
        lambda: lying(sizes=[{"as_int": HUGE}]), (BAD, TOO_LARGE),
    ),
    "of a tensor of four terabytes that repeats a number": (
        lambda: lying(sizes=[{"as_int": HUGE}], strides=[{"as_int": 0}]), (TOO_LARGE,),
    ),
    "of a tensor that is too long": (lambda: lying(sizes=[{"as_int": 5}]), (BAD,)),
    "of a tensor that begins beyond": (lambda: lying(storage_offset={"as_int": 1}), (BAD,)),
    "of a tensor that begins before": (lambda: lying(storage_offset={"as_int": -1}), (BAD,)),
    "of a tensor that runs backwards": (lambda: lying(strides=[{"as_int": -1}]), (BAD,)),
    "of a tensor without strides": (lambda: lying(strides=[]), (BAD,)),
    "of a size with a symbol": (
        lambda: lying(sizes=[{"as_expr": {"expr_str": "__import__('os')"}}]), (BAD,),
    ),
    "of a size in a fraction": (lambda: lying(sizes=[{"as_int": 4.0}]), (BAD,)),
    "of a thousand dimensions": (
        lambda: lying(sizes=[{"as_int": 1}] * 999, strides=[{"as_int": 1}] * 999), (BAD,),
    ),
    "of a dtype that is not": (lambda: lying(dtype=99), (UNSUPPORTED,)),
    "of a dtype that is true": (lambda: lying(dtype=True), (UNSUPPORTED,)),
    "of a sparse tensor": (lambda: lying(layout=1), (UNSUPPORTED,)),
    "of a tensor on the meta device": (
        lambda: lying(device={"type": "meta", "index": None}), (UNSUPPORTED,),
    ),
    "of a storage with two dtypes": (
        lambda: zipped(*parts(table(("w", described()), ("x", described(dtype=4))))), (BAD,),
    ),
    # The tables.
    "with a name twice": (
        lambda: zipped(*parts(table(("w", described()), ("w", described())))), (BAD,),
    ),
    "with a name that nobody can see": (
        lambda: zipped(*parts(table(("\x00w", described())))), (BAD,),
    ),
    "whose table says two things at once": (
        lambda: zipped(*parts(table(("w", described())).replace(
            b'"use_pickle": false', b'"use_pickle": false, "use_pickle": true'
        ))), (BAD,),
    ),
    "whose table is a list": (lambda: zipped(*parts(b'{"config": [[]]}')), (BAD,)),
    "whose table is empty": (lambda: zipped(*parts(b"")), (BAD,)),
    "whose table is no text": (lambda: zipped(*parts(b"\xff\xfe\x00")), (BAD,)),
    "whose table nests without end": (
        lambda: zipped(*parts(b'{"config": {"w": ' + b'{"a": ' * 2_000_000)), (BAD,),
    ),
    "whose table is five million lists": (
        lambda: zipped(*parts(b'{"config": {"w": {"a": [' + b"[]," * 5_000_000 + b"[]]}}}")), (BAD,),
    ),
    "whose table has a name of ten megabytes": (
        lambda: zipped(*parts(table(("w" * 10_000_000, described())))), (BAD,),
    ),
    "whose table has twenty megabytes": (
        lambda: zipped(*parts(b" " * 20_000_000 + table(("w", described())))), (HEADER,),
    ),
    "with thirty thousand tensors": (
        lambda: zipped(*parts(table(*((f"w{i}", described()) for i in range(30_000))))), (MANY, HEADER),
    ),
    # The rest.
    "without a graph": (lambda: without("models/model.json"), (BAD,)),
    "without a table of weights": (lambda: without("data/weights/model_weights_config.json"), (BAD,)),
    "without a table of constants": (
        lambda: without("data/constants/model_constants_config.json"), (BAD,),
    ),
    "without a version": (lambda: without("archive_version"), (BAD,)),
    "without a storage": (lambda: without("data/weights/weight_0"), (BAD,)),
    "of another layout": (
        lambda: zipped(*(
            Part(p.name, b"7") if p.name == "net/archive_version" else p for p in parts()
        )), ("UNSUPPORTED_LAYOUT",),
    ),
    "of the layout before torch 2.8": (
        lambda: zipped(
            Part("net/serialized_exported_program.json", b"{}"),
            Part("net/serialized_state_dict.pt", ARMED),
        ), (UNKNOWN,),
    ),
    "with a graph that is compressed": (
        lambda: zipped(*(
            Part(p.name, p.data, deflate=True) if p.name == "net/models/model.json" else p
            for p in parts()
        )), (BAD,),
    ),
    "with a wrong CRC in its graph": (
        lambda: zipped(*(
            Part(p.name, p.data, crc=1) if p.name == "net/models/model.json" else p for p in parts()
        )), (BAD,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in FILES.items():
    hostile(f"an export {_name}", *_codes)(_build)
