"""Tensors that claim what their storage does not hold, and state dicts with impossible names."""

import functools
from collections.abc import Callable

from tests.ai.hostile.building import (
    BAD,
    DICT,
    FALSE,
    FOUR,
    HOSTILE,
    LIST,
    MANY,
    NO_STATE,
    NONE,
    ORDERED,
    SETITEM,
    TOO_LARGE,
    TRUE,
    UNSUPPORTED,
    call,
    get,
    hostile,
    listed,
    module,
    named,
    number,
    numbers,
    pairs,
    path,
    put,
    real,
    saved,
    several,
    state_dict,
    storage,
    tensor,
    text,
)  # fmt: skip

TENSORS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "longer than its storage": (tensor(size=numbers(5)), (BAD,)),
    "with an offset beyond its storage": (tensor(offset=number(1)), (BAD,)),
    "with an offset of 2^62": (tensor(offset=number(2**62)), (BAD,)),
    "with an offset of 2^64": (tensor(offset=number(2**64)), (BAD, HOSTILE)),
    "with a negative offset": (tensor(offset=number(-1)), (BAD,)),
    "with a true offset": (tensor(offset=TRUE), (BAD,)),
    "with a negative stride": (tensor(stride=numbers(-1), offset=number(3)), (BAD,)),
    "with a stride beyond its storage": (tensor(stride=numbers(2)), (BAD,)),
    "with a stride of 2^62": (tensor(size=numbers(2), stride=numbers(2**62)), (BAD,)),
    "with a negative size": (tensor(size=numbers(-4)), (BAD,)),
    "of 2^62": (tensor(size=numbers(2**62)), (BAD,)),
    "of 2^63": (tensor(size=numbers(2**63)), (BAD, HOSTILE)),
    "of 2^64 + 4": (tensor(size=numbers(2**64 + 4)), (BAD, HOSTILE)),
    "of 2^32 by 2^32": (tensor(size=numbers(2**32, 2**32), stride=numbers(0, 0)), (BAD, TOO_LARGE)),
    "of 2^62 by nothing": (tensor(size=numbers(2**62, 0), stride=numbers(1, 1)), (BAD,)),
    "that repeats one number to 4 GB": (tensor(size=numbers(2**30), stride=numbers(0)), (TOO_LARGE,)),
    "that repeats one number to a terabyte": (
        tensor(size=numbers(2**38), stride=numbers(0)), (TOO_LARGE,),
    ),
    "with more sizes than strides": (tensor(size=numbers(2, 2)), (BAD,)),
    "with more strides than sizes": (tensor(stride=numbers(1, 1)), (BAD,)),
    "of 65 dimensions": (tensor(size=numbers(*[1] * 65), stride=numbers(*[1] * 65)), (BAD,)),
    "of a true size": (tensor(size=several(TRUE)), (BAD,)),
    "of a fractional size": (tensor(size=several(real(4.0))), (BAD,)),
    "of size NaN": (tensor(size=several(real(float("nan")))), (BAD,)),
    "of no size": (tensor(size=several(NONE)), (BAD,)),
    "of a size in text": (tensor(size=several(text("4"))), (BAD,)),
    "whose size is a number": (tensor(size=number(4)), (BAD,)),
    "whose size is a text": (tensor(size=text("4")), (BAD,)),
    "whose size is a tensor": (tensor(size=tensor()), (BAD,)),
    "whose size is a dict": (tensor(size=DICT), (BAD,)),
    "without a storage": (tensor(store=NONE), (BAD,)),
    "whose storage is a tensor": (tensor(store=tensor()), (BAD,)),
    "whose storage is a text": (tensor(store=text("0")), (BAD,)),
    "of an unknown dtype": (
        tensor(None, None, None, None, FALSE, None, path("torch", "quint8"), rebuild="_rebuild_tensor_v3"),
        (UNSUPPORTED,),
    ),
    "of a dtype that is a text": (
        tensor(None, None, None, None, FALSE, None, text("float32"), rebuild="_rebuild_tensor_v3"),
        (UNSUPPORTED,),
    ),
    "of a dtype wider than its storage": (
        tensor(
            None, None, None, None, FALSE, None, path("torch", "float64"), rebuild="_rebuild_tensor_v3"
        ), (BAD,),
    ),
    "with too few arguments": (
        call(path("torch._utils", "_rebuild_tensor_v2"), storage(), number(0)), (BAD, UNSUPPORTED),
    ),
    "with no arguments": (call(path("torch._utils", "_rebuild_tensor_v2")), (BAD, UNSUPPORTED)),
    "with ten arguments": (
        tensor(None, None, None, None, FALSE, None, NONE, NONE, NONE, NONE), (BAD, UNSUPPORTED),
    ),
    "by the oldest function": (
        call(path("torch._utils", "_rebuild_tensor"), storage(), number(0), numbers(4), numbers(1)),
        (UNSUPPORTED, BAD),
    ),
    "that is sparse": (
        call(
            path("torch._utils", "_rebuild_sparse_tensor"),
            call(path("torch.serialization", "_get_layout"), text("torch.sparse_coo")),
            several(tensor(), tensor(), numbers(4)),
        ), (UNSUPPORTED,),
    ),
    "that is quantized": (
        call(path("torch._utils", "_rebuild_qtensor"), storage(), number(0), numbers(4), numbers(1)),
        (UNSUPPORTED,),
    ),
    "on the meta device": (
        call(path("torch._utils", "_rebuild_meta_tensor_no_storage"), NONE, numbers(4), numbers(1), FALSE),
        (UNSUPPORTED,),
    ),
    "that is nested": (
        call(path("torch._utils", "_rebuild_nested_tensor"), tensor(), numbers(4), numbers(1), numbers(0)),
        (UNSUPPORTED,),
    ),
    "on another device by way of numpy": (
        call(path("torch._utils", "_rebuild_device_tensor_from_numpy"), NONE, NONE, NONE, FALSE),
        (UNSUPPORTED,),
    ),
    "by a function that torch does not have": (
        call(path("torch._utils", "_rebuild_everything"), text("x")), (UNSUPPORTED,),
    ),
    "that is a lazy conjugate": (
        tensor(None, None, None, None, FALSE, None, named({"conj": TRUE})), (UNSUPPORTED,),
    ),
    "whose parameter is a text": (
        call(path("torch._utils", "_rebuild_parameter"), text("x"), TRUE, call(ORDERED)), (BAD,),
    ),
    "whose parameter is nothing": (call(path("torch._utils", "_rebuild_parameter")), (BAD, UNSUPPORTED)),
    "of a type whose function is no function": (
        call(path("torch._tensor", "_rebuild_from_type_v2"), text("f"), text("t"), several(), DICT),
        (BAD, UNSUPPORTED, HOSTILE),
    ),
    "of a type with a number for arguments": (
        call(
            path("torch._tensor", "_rebuild_from_type_v2"), path("torch._utils", "_rebuild_parameter"),
            path("torch", "Tensor"), number(5), DICT,
        ), (BAD, UNSUPPORTED, HOSTILE),
    ),
    "of a type with a dict for arguments": (
        call(
            path("torch._tensor", "_rebuild_from_type_v2"), path("torch._utils", "_rebuild_parameter"),
            path("torch", "Tensor"), DICT, DICT,
        ), (BAD, UNSUPPORTED, HOSTILE),
    ),
    "of a type of a type with a number for arguments": (
        call(
            path("torch._tensor", "_rebuild_from_type_v2"),
            path("torch._tensor", "_rebuild_from_type_v2"), path("torch", "Tensor"), number(5), DICT,
        ), (BAD, UNSUPPORTED, HOSTILE),
    ),
    "of a type with a persistent id for arguments": (
        call(
            path("torch._tensor", "_rebuild_from_type_v2"), path("torch._utils", "_rebuild_tensor_v2"),
            path("torch", "Tensor"), storage(), DICT,
        ), (BAD, UNSUPPORTED, HOSTILE),
    ),
}  # fmt: skip
for _name, (_value, _codes) in TENSORS.items():
    hostile(f"a tensor {_name}", *_codes)(
        functools.partial(lambda value: saved(state_dict(x=value)), _value)
    )

HUNDRED = number(100)
NAMES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "an empty name": (lambda: pairs((text(""), tensor())), (BAD,)),
    "a name of 600 characters": (lambda: pairs((text("w" * 600), tensor())), (BAD,)),
    "a name with a NUL": (lambda: pairs((text("a\0b"), tensor())), (BAD,)),
    "a name with a line's end": (lambda: pairs((text("a\nb"), tensor())), (BAD,)),
    "a name with half a surrogate pair": (lambda: pairs((text("a\ud800"), tensor())), (BAD, HOSTILE)),
    "the name __metadata__": (lambda: pairs((text("__metadata__"), tensor())), (BAD,)),
    "a number for a name": (lambda: pairs((number(0), tensor())), (NO_STATE,)),
    "bytes for a name": (lambda: pairs((b"C\x01w", tensor())), (NO_STATE,)),
    "None for a name": (lambda: pairs((NONE, tensor())), (NO_STATE,)),
    "a tuple for a name": (lambda: pairs((several(text("w")), tensor())), (NO_STATE,)),
    "a tensor for a name": (lambda: pairs((tensor(), tensor())), (NO_STATE, HOSTILE)),
    "a name twice": (lambda: pairs((text("w"), tensor()), (text("w"), tensor())), (BAD,)),
    "a name twice by memo": (
        lambda: put(tensor(), 0) + b"0" + pairs((text("w"), get(0)), (text("w"), get(0))), (BAD,),
    ),
    "twenty-five thousand names": (
        lambda: put(tensor(), 0) + b"0" + pairs(*((text(str(i)), get(0)) for i in range(25_000))), (MANY,),
    ),
    "a name twice in a module": (
        lambda: module({"_parameters": pairs((text("w"), tensor()), (text("w"), tensor()))}), (BAD,),
    ),
    "one name for a parameter and a child's": (
        lambda: module(
            {
                "_parameters": pairs((text("a.w"), tensor())),
                "_modules": named({"a": module()}),
            }
        ), (BAD,),
    ),
    "a module of a number": (lambda: module({"_modules": named({"a": number(1)})}), (NO_STATE,)),
    "a module of a tensor": (lambda: module({"_modules": named({"a": tensor()})}), (NO_STATE,)),
    "a parameter that is a number": (lambda: module({"_parameters": named({"a": number(1)})}), (NO_STATE,)),
    "parameters that are a list": (lambda: module({"_parameters": listed(tensor())}), (NO_STATE,)),
    "parameters that are a tensor": (lambda: module({"_parameters": tensor()}), (NO_STATE,)),
    "children that are None": (lambda: module({"_modules": NONE}), (NO_STATE,)),
    "a module with two states": (
        lambda: module() + named({"_parameters": DICT, "_modules": DICT}) + b"b", (HOSTILE, BAD),
    ),
    "a module without a state": (lambda: path("hospital.models", "Net") + b")\x81", (NO_STATE,)),
    "a value of bytes": (lambda: state_dict(x=b"C\x01w"), (NO_STATE,)),
    "a value of a class": (lambda: state_dict(x=path("torch", "FloatStorage")), (NO_STATE,)),
    "a value of a storage": (lambda: state_dict(x=storage()), (NO_STATE,)),
    "a list with a number": (lambda: listed(tensor(), HUNDRED), (NO_STATE,)),
    "a dict of dicts": (lambda: state_dict(x=state_dict()), (NO_STATE,)),
    "an empty list": (lambda: LIST, (NO_STATE, "NO_TENSORS")),
    "an OrderedDict filled as a list": (lambda: call(ORDERED) + tensor() + b"a", (HOSTILE, NO_STATE)),
    "an OrderedDict in itself": (
        lambda: put(call(ORDERED), 0) + text("w") + get(0) + SETITEM, (NO_STATE,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in NAMES.items():
    hostile(f"in a state dict or module, {_name}", *_codes)(
        functools.partial(lambda build: saved(build()), _build)
    )


@hostile("twenty thousand tensors of 64 dimensions, and one that lies", BAD, MANY)
def many_dimensions() -> bytes:
    size = put(numbers(*[1] * 64), 1) + put(numbers(*[2] * 28, *[0] * 36), 2) + b"00"
    one = put(tensor(size=get(1), stride=get(2)), 3) + b"0"
    items = [(text(f"{i}"), get(3)) for i in range(19_998)]
    return saved(size + one + pairs(*items, (text("w"), tensor(size=numbers(9)))))


@hostile("one storage under two lengths", BAD)
def two_lengths() -> bytes:
    long = storage(cls=path("torch", "DoubleStorage"), count=number(4))
    return saved(state_dict(x=tensor(long)), {"0": FOUR})
