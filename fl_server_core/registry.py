"""Named plug-ins that register themselves: one file, one decorator, no list to edit."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from fl_server_core import plugins

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps stable names to classes.

    `package` is searched once, at first use: every module in it is imported, then every entry point in the
    group of the same name, then the files of the plug-in folder. Names are unique; registering one twice is an
    error, and the later one is left out if it is a plug-in's. `verify` may raise for a plug-in's class.
    """

    def __init__(
        self, package: str, *, verify: Callable[[str, type[T]], None] | None = None
    ) -> None:
        self.package = package
        self._verify = verify
        self._items: dict[str, type[T]] = {}
        self._state = "new"  # then loading, then loaded

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def verify(item: type[T]) -> None:
            if self._verify is not None:
                self._verify(name, item)

        def add(item: type[T]) -> type[T]:
            if plugins.loading():
                self._load_own()  # else a plug-in could take the name of one of ours
            known = self._items.get(name)
            if known is not None and known is not item:
                raise ValueError(f"{name!r} is already registered by {known.__module__}")
            if known is None:
                self._items[name] = item
                plugins.added(lambda: self._items.pop(name, None), lambda: verify(item))
            return item

        return add

    def __getitem__(self, name: str) -> type[T]:
        self._load()
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def _load(self) -> None:
        if self._state == "loaded" and plugins.is_read():
            return
        with plugins.LOCK:  # threads wait for the first; what it imports may ask again
            self._load_own()
            if self._state == "loaded":
                plugins.read_folder()

    def _load_own(self) -> None:
        if self._state != "new":
            return
        self._state = "loading"
        try:
            with plugins.own():
                for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                    importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._state = "new"
            raise
        for entry_point in entry_points(group=self.package):
            with plugins.plugin(f"{plugins.ENTRY}{entry_point.name} = {entry_point.value}"):
                entry_point.load()
        self._state = "loaded"
