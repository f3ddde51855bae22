"""The JSON of a safetensors header, read entry by entry so that no header costs more than it says.

A JSON library would first build whatever 16 MiB can spell: five million lists, or a nesting that
exhausts the stack. Here a tensor's entry is a few kilobytes without inner objects, or it is refused.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import BadContainer

METADATA = "__metadata__"
SPACE = re.compile(r"[ \t\r\n]*+")
# Possessive (*+): no backtracking, so a hostile string costs neither time nor stack.
STRING = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
ENTRY = re.compile(r"\{[^{}]{0,4096}+\}")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def read_header(raw: bytes, limits: Limits) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The tensors' entries by name, their fields not checked yet, and the metadata."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadContainer(f"the header is not UTF-8: {error.reason}") from error
    tensors: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] | None = None
    reader = Reader(text)
    for name in reader.each_key():
        if name == METADATA:
            if metadata is not None:
                raise BadContainer("__metadata__ occurs twice")
            metadata = _metadata(reader, limits)
            continue
        check_name(name, limits)
        if name in tensors:
            raise BadContainer(f"the tensor name {name!r} occurs twice")
        if len(tensors) == limits.tensors:
            raise BadContainer(
                f"more than {limits.tensors:,} tensors are not allowed", code="TOO_MANY_TENSORS"
            )
        tensors[name] = reader.entry(name)
    if reader.skip() != len(text):
        raise BadContainer("the header goes on after its JSON object")
    return tensors, metadata or {}


def check_name(name: str, limits: Limits) -> None:
    """Refuse a tensor's name: too long, empty, or with characters that nobody can see."""
    if not name or len(name) > limits.name_length or UNPRINTABLE.search(name) or name == METADATA:
        raise BadContainer(f"bad tensor name {name[:64]!r}")


def _metadata(reader: "Reader", limits: Limits) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in reader.each_key():
        value = reader.string()
        if (
            key in found
            or len(found) == limits.tensors
            or re.search("[\ud800-\udfff]", key + value)
        ):
            raise BadContainer("__metadata__ has a key twice, too many keys, or is no Unicode")
        found[key] = value
    return found


class Reader:
    """Reads a JSON text from its start, one key or entry at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> int:
        """Behind the next white space."""
        self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.at

    def take(self, char: str) -> bool:
        if self.text[self.skip() : self.at + 1] != char:
            return False
        self.at += 1
        return True

    def need(self, char: str) -> None:
        if not self.take(char):
            raise BadContainer(f"the header is no valid JSON: {char!r} expected at {self.at:,}")

    def each_key(self) -> Iterator[str]:
        """Each key of an object; the caller reads the value before it asks for the next."""
        self.need("{")
        if self.take("}"):
            return
        while True:
            key = self.string()
            self.need(":")
            yield key
            if self.take("}"):
                return
            self.need(",")

    def string(self) -> str:
        found = STRING.match(self.text, self.skip())
        if found is None:
            raise BadContainer(f"the header is no valid JSON: a string expected at {self.at:,}")
        self.at = found.end()
        return str(_loads(found.group()))

    def entry(self, name: str, form: re.Pattern[str] = ENTRY, most: int = 4200) -> dict[str, Any]:
        """An object that `form` matches, of at most so many characters."""
        at = self.skip()
        found = form.match(self.text, at, at + most)
        if found is None:
            raise BadContainer(f"tensor {name!r} is not described by a plain JSON object")
        self.at = found.end()
        entry: dict[str, Any] = _loads(found.group())
        return entry


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadContainer(f"the header is no valid JSON: {str(error)[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
