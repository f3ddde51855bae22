"""Files in which torch finds other tensors than a careless reader does."""

from tests.ai.hostile.building import (
    APPEND,
    BAD,
    BUILD,
    DICT,
    EMPTY,
    HOSTILE,
    MARKER,
    NEWOBJ,
    NO_STATE,
    ORDERED,
    SETITEM,
    UNSUPPORTED,
    call,
    hostile,
    listed,
    module,
    named,
    number,
    numbers,
    path,
    saved,
    several,
    state_dict,
    storage,
    tensor,
    text,
)  # fmt: skip

MARK_PATH = text(str(MARKER))

MISLED = (HOSTILE, BAD, UNSUPPORTED, NO_STATE)


@hostile("a tensor is given other numbers by BUILD", *MISLED)
def built_tensor() -> bytes:
    other = several(storage(text("1")), number(0), numbers(4), numbers(1))
    value = named({"w": tensor() + other + BUILD})
    return saved(value, {"0": bytes(16), "1": bytes(16)})


@hostile("a tensor is given another number by SETITEM", *MISLED)
def item_of_tensor() -> bytes:
    return saved(named({"w": tensor() + number(0) + number(9) + SETITEM}))


@hostile("a tensor is given items by APPEND", *MISLED)
def appended_tensor() -> bytes:
    return saved(named({"w": tensor() + number(9) + APPEND}))


@hostile("an OrderedDict holds a tensor in its arguments", *MISLED)
def hidden_tensor() -> bytes:
    hidden = listed(listed(text("hidden"), tensor()))
    return saved(call(ORDERED, hidden) + text("w") + tensor() + SETITEM)


@hostile("a module hides a tensor in an OrderedDict's arguments", *MISLED)
def hidden_parameter() -> bytes:
    hidden = call(ORDERED, listed(listed(text("hidden"), tensor())))
    return saved(module({"_buffers": hidden}))


CHILD = (
    path("torch.nn.modules.linear", "Identity") + EMPTY + NEWOBJ
    + named({"_parameters": named({"w": tensor()}), "_buffers": DICT, "_modules": DICT}) + BUILD
)  # fmt: skip


@hostile("a Sequential gets another module by APPEND", *MISLED)
def appended_module() -> bytes:
    return saved(module(cls=path("torch.nn.modules.container", "Sequential")) + CHILD + APPEND)


@hostile("a ModuleDict gets another module by SETITEM", *MISLED)
def item_of_module() -> bytes:
    cls = path("torch.nn.modules.container", "ModuleDict")
    return saved(module(cls=cls) + text("hidden") + CHILD + SETITEM)


@hostile("one storage under two dtypes", *MISLED)
def two_dtypes() -> bytes:
    """torch keeps the first of the classes; read as integers, the same bits are other numbers."""
    return saved(state_dict(x=tensor(storage(cls=path("torch", "IntStorage")))))


@hostile("a storage on the meta device, with numbers", *MISLED)
def meta_storage() -> bytes:
    """torch gives a tensor without numbers."""
    return saved(named({"w": tensor(storage(location=text("meta")))}))
