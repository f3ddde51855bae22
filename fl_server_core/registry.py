"""Named plug-ins that register themselves: one file, one decorator, no list to edit."""

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps stable names to classes.

    `package` is searched once, at first use: every module in it is imported, then every entry point in the
    group of the same name. Names are unique; registering one twice is a programming error.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._items: dict[str, type[T]] = {}
        self._state = "new"  # then loading, then loaded
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def add(item: type[T]) -> type[T]:
            known = self._items.setdefault(name, item)
            if known is not item:
                raise ValueError(f"{name!r} is already registered by {known.__module__}")
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
        if self._state == "loaded":
            return
        with self._lock:  # threads wait for the first; what it imports may ask again
            if self._state != "new":
                return
            self._state = "loading"
            try:
                for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                    importlib.import_module(f"{self.package}.{module.name}")
                for entry_point in entry_points(group=self.package):
                    entry_point.load()
            except BaseException:
                self._state = "new"
                raise
            self._state = "loaded"
