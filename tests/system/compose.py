"""Reads docker-compose.yml and gives its services' commands and environments as they stand there."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.system.processes import ROOT

VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?:(?P<kind>:-|:\?)(?P<rest>[^}]*))?\}")


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$`, as Compose replaces them."""

    def value(found: re.Match[str]) -> str:
        if found.group() == "$$":
            return "$"
        name, kind, rest = found["name"], found["kind"], found["rest"]
        if values.get(name):
            return values[name]
        if kind == ":-":
            return str(rest)
        raise KeyError(f"{name}: {rest or 'not set'}")

    return VARIABLE.sub(value, text)


class Compose:
    """The file, with what an operator sets (`values`) and where things are here (`places`)."""

    def __init__(self, values: Mapping[str, str], places: Mapping[str, str]) -> None:
        self._values, self._places = values, places
        self._file: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

    def command(self, service: str) -> list[str]:
        return shlex.split(self._here(self._file["services"][service]["command"]))

    def healthcheck(self, service: str) -> list[str]:
        kind, *command = self._file["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        return [self._here(part) for part in command]

    def environment(self, service: str) -> dict[str, str]:
        given = self._file["services"][service]["environment"]
        return {name: self._here(str(value)) for name, value in given.items()}

    def secrets(self) -> dict[str, Path]:
        return {name: Path(entry["file"]) for name, entry in self._file["secrets"].items()}

    def _here(self, text: str) -> str:
        text = interpolated(text, self._values)
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text
