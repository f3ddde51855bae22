"""Reads environment variables, remembers what each is for, and takes secrets from files."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import overload


class MissingSetting(Exception):
    """A variable without a default is not set."""


@dataclass(frozen=True)
class Setting:
    """One variable, for `docs/reference/settings.md`."""

    name: str
    default: str | None
    about: str


SETTINGS: dict[str, Setting] = {}


@overload
def env(name: str, default: str, about: str) -> str: ...
@overload
def env(name: str, default: None, about: str) -> str | None: ...
def env(name: str, default: str | None, about: str) -> str | None:
    """The value of `NAME`, or the stripped contents of the file that `NAME_FILE` names (it wins)."""
    SETTINGS[name] = Setting(name, default, about)
    if path := os.environ.get(f"{name}_FILE"):
        return Path(path).read_text(encoding="utf-8").strip()
    return os.environ.get(name, default)


def env_bool(name: str, default: bool, about: str) -> bool:
    """True for 1, true, yes and on, in any case."""
    return env(name, "1" if default else "0", about).strip().lower() in {"1", "true", "yes", "on"}


def env_int(name: str, default: int, about: str) -> int:
    """A whole number, in the unit that `about` states."""
    return int(env(name, str(default), about))


def env_list(name: str, default: str, about: str) -> list[str]:
    """Values separated by commas or new lines; blanks are dropped."""
    parts = env(name, default, about).replace("\n", ",").split(",")
    return [part.strip() for part in parts if part.strip()]


def child_environment() -> dict[str, str]:
    """This process's environment for a child: it imports from, and is configured by, the same."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def required(name: str, about: str) -> str:
    """A variable that has no safe default; its absence stops the start with the next step."""
    value = env(name, None, about)
    if not value:
        raise MissingSetting(f"set {name} (or {name}_FILE to a file that holds it): {about}")
    return value
