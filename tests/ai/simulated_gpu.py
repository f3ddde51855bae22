"""A GPU that is not there: torch's calls are done on the CPU, and the order that streams promise is checked.

A GPU's streams run beside each other and beside the host; only events, waits, and copies that hold the host put them
in order. Each stream, and the host, has a vector clock: how far it knows each stream to be. An operation that touches
memory on the device must know of the last one that wrote there, and one that writes of all that have read since;
otherwise a real device may do them in the other order, and here it is a `Race`. Making memory counts as writing:
whoever had it before may still be at work on the stream that it belongs to.

Threads have a host and a default stream each. On the device is what was made or moved there, and what comes of it.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda:0")
CHANGING = {
    f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior")
}
HOLDING = {"item", "tolist", "__bool__", "__float__", "__int__", "equal", "allclose", "nonzero"}
EMPTY = {"empty", "new_empty", "empty_like"}
MIXING = {"copy_", "__getitem__", "__setitem__"}  # what takes tensors of host and device together
MOVING = {"to", "cpu", "cuda"}


class Race(AssertionError):
    """What a real device may do in another order."""


class Stream:
    """Stands for `torch.cuda.Stream`; of one thread."""

    def __init__(self, host: "Host") -> None:
        self.host = host
        self.clock: Clock = {}

    def step(self) -> int:
        """One more operation: it comes after all that the host, which asks for it, has waited for."""
        join(self.clock, self.host.clock)
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def knows(self, other: "Stream", time: int) -> bool:
        return max(self.clock.get(other, 0), self.host.clock.get(other, 0)) >= time

    def must_know(self, past: Sequence[tuple["Stream", int]]) -> None:
        if not all(self.knows(stream, time) for stream, time in past):
            raise Race("worked on before another stream was done with it")

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        join(self.clock, event.clock)


Clock = dict[Stream, int]


def join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self) -> None:
        self.clock: Clock = {}
        self.host: Host | None = None

    def record(self, stream: Stream) -> None:
        self.clock, self.host = dict(stream.clock), stream.host

    def synchronize(self) -> None:
        if self.host is not None:
            self.host.hold(self.clock)


@dataclass
class Memory:
    """A piece of the device's memory: on which stream it was made, and who touched it last."""

    home: Stream
    written: tuple[Stream, int]
    reads: dict[Stream, int] = field(default_factory=dict)
    recorded: list[Stream] = field(default_factory=list)


def leaves(given: Any) -> list[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, list | tuple):
        return []
    return [leaf for one in given for leaf in leaves(one)]


def key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Host(TorchFunctionMode):
    """Does what a thread asks of torch, at once, and notes on which stream a GPU would have done it."""

    def __init__(self, gpu: "Gpu") -> None:
        super().__init__()
        self.gpu = gpu
        self.clock: Clock = {}
        self.current = Stream(self)  # the default one; others work beside it
        self.under_way: dict[int, tuple[Stream, int, Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__get__":
            asked = {"device": CUDA, "is_cuda": True} if self.gpu.has(args[0]) else {}
            return asked.get(func.__self__.__name__) or func(*args)
        if name in MOVING:
            return self._move(name, args, kwargs)
        if name == "numpy" and self.gpu.has(args[0]):
            raise TypeError("the host can't read a device's memory")
        return self._do(func, name, args, kwargs)

    def _do(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Anything that is no move: on the device if what it takes is there, or is asked to be."""
        given = leaves((args, kwargs))
        there = [one for one in given if self.gpu.has(one)]
        if there and name not in MIXING and any(x.dim() and not self.gpu.has(x) for x in given):
            raise RuntimeError(f"{name} takes tensors of the host and of the device together")
        asked = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if asked:
            kwargs["device"] = "cpu"
        pinned = kwargs.pop("pin_memory", False)
        if name == "copy_" and self.gpu.has(args[0]) != self.gpu.has(args[1]):
            return self._copy(*args, **kwargs)
        changed = leaves(kwargs.get("out"))
        if name in CHANGING or (name.endswith("_") and not name.endswith("__")):
            changed += leaves(args[:1])
        known = {key(one) for one in given}
        made = func(*args, **kwargs)
        fresh = [one for one in leaves(made) if key(one) not in known]
        if pinned:
            self.gpu.pinned |= {key(one) for one in fresh}
        if there or asked:
            for one in fresh:
                self.gpu.add(one, self)
            if name in HOLDING or changed or (fresh and name not in EMPTY):
                self.touch(there, [*changed, *fresh])
            if name in HOLDING:
                self.hold(self.current.clock)
        return made

    def _move(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`to`, `cpu`, `cuda`."""
        given, more = args[0], [*args[1:], *kwargs.values()]
        places = [torch.device(one) for one in more if isinstance(one, str | torch.device)]
        dtype = next((one for one in more if isinstance(one, torch.dtype)), given.dtype)
        was = self.gpu.has(given)
        to_gpu = name == "cuda" or any(place.type == "cuda" for place in places)
        to_cpu = name == "cpu" or any(place.type == "cpu" for place in places)
        if was and to_cpu:  # in two steps, as torch does it: cast there, then copied
            made = torch.empty_like(given, dtype=dtype)
            self._copy(made, given)
            return made
        made = given.to(dtype)
        if not was and to_gpu:
            made = made.clone()
            self.gpu.add(made, self)
            self.touch([], [made])
            self.hold(self.current.clock)
        elif was and key(made) != key(given):
            self.gpu.add(made, self)
            self.touch([given], [made])
        return made

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Between host and device. Pinned memory is read, or written, whenever the stream comes to it."""
        at = source.data_ptr()
        if at in self.under_way:
            raise Race("read over while it was copied")
        target.copy_(source)
        time = self.touch([source], [target])
        if not non_blocking:
            self.hold(self.current.clock)
        elif key(source) in self.gpu.pinned:
            self.under_way[at] = self.current, time, source, source.clone()
            self.gpu.most = max(self.gpu.most, len(self.under_way))
        elif self.gpu.has(source):
            raise Race("the host may read what has not arrived")
        return target

    def touch(self, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
        """One operation on the current stream; returns its time there."""
        stream, now = self.current, self.current.step()
        self.gpu.operations += 1
        for one in read:
            if (memory := self.gpu.memory.get(key(one))) is not None:
                stream.must_know([memory.written])
                memory.reads[stream] = now
        for one in written:
            if (memory := self.gpu.memory.get(key(one))) is not None:
                stream.must_know([memory.written, *memory.reads.items()])
                memory.written, memory.reads = (stream, now), {}
        return now

    def hold(self, clock: "Clock") -> None:
        """Until the streams have come so far."""
        join(self.clock, clock)
        for at, (stream, time, source, before) in list(self.under_way.items()):
            if self.clock.get(stream, 0) >= time:
                if not torch.equal(source.view(torch.uint8), before.view(torch.uint8)):
                    raise Race("read over while it was copied")
                del self.under_way[at]


class Gpu:
    """The device, for all threads. `faults` holds what could be raised to nobody; `most` copies were under way at a time."""

    def __init__(self) -> None:
        self.memory: dict[int, Memory] = {}
        self.pinned: set[int] = set()
        self.faults: list[str] = []
        self.most = 0
        self.operations = 0
        self._threads = threading.local()

    def host(self) -> Host:
        """Of this thread; what it asks of torch is looked at from the first time on until it ends."""
        if not hasattr(self._threads, "host"):
            self._threads.host = Host(self)
            self._threads.host.__enter__()
        host: Host = self._threads.host
        return host

    def has(self, tensor: Tensor) -> bool:
        return key(tensor) in self.memory

    def add(self, tensor: Tensor, host: Host) -> None:
        stream = host.current
        self.memory[key(tensor)] = Memory(stream, (stream, stream.step()))
        weakref.finalize(tensor.untyped_storage(), self._freed, key(tensor))

    def _freed(self, at: int) -> None:
        memory = self.memory.pop(at)
        for stream, time in [memory.written, *memory.reads.items()]:
            if not (stream in memory.recorded or memory.home.knows(stream, time)):
                self.faults.append("memory was given back while another stream worked on it")

    def stream(self, _: object = None) -> Stream:
        return Stream(self.host())

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """Stands for `Tensor.record_stream`."""
        self.memory[key(tensor)].recorded.append(stream)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for `torch.cuda.stream`."""
        before, stream.host.current = stream.host.current, stream
        try:
            yield
        finally:
            stream.host.current = before


def simulate(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """`cuda:0`, for threads that make a stream before anything else there."""
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(Tensor, "record_stream", lambda *given: made.record(*given))
    return made
