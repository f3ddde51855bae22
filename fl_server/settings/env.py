"""Reads environment variables, remembers what each is for, and takes secrets from files."""

import errno
import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from django.core.exceptions import ImproperlyConfigured


class BadSetting(ImproperlyConfigured):
    """A variable has a value that can't be used; says which one, and what to do."""


class MissingSetting(BadSetting):
    """A variable without a default is not set."""


@dataclass(frozen=True)
class Setting:
    """One variable, for `docs/reference/settings.md`."""

    name: str
    default: str | None
    about: str


@dataclass(frozen=True)
class Places:
    """Some of the network, by address or by name."""

    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    names: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {}
HOST = re.compile(r"\.?[a-z](?:[a-z0-9.-]*[a-z0-9])?", re.IGNORECASE)


@overload
def env(name: str, default: str, about: str) -> str: ...
@overload
def env(name: str, default: None, about: str) -> str | None: ...
def env(name: str, default: str | None, about: str) -> str | None:
    """The value of `NAME`, or the stripped contents of the file that `NAME_FILE` names (it wins)."""
    SETTINGS[name] = Setting(name, default, about)
    if path := os.environ.get(f"{name}_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(f"{name}_FILE: {path!r} can't be read: {_why(error)}") from error
    return os.environ.get(name, default)


def env_bool(name: str, default: bool, about: str) -> bool:
    """True for 1, true, yes and on, in any case; False for 0, false, no, off and nothing."""
    word = env(name, "1" if default else "0", about).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"", "0", "false", "no", "off"}:
        return False
    raise BadSetting(f"{name} is {word!r}; set it to 1 or 0: {about}")


def env_int(name: str, default: int, about: str) -> int:
    """A whole number, in the unit that `about` states."""
    text = env(name, str(default), about)
    try:
        return int(text)
    except ValueError:
        said = f"{name} is {text!r}; set it to a whole number, like {default}: {about}"
        raise BadSetting(said) from None


PERIODS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def env_rate(name: str, default: str, about: str) -> tuple[int, int]:
    """`600/m` as (600, 60): how often in how many seconds; 0 times is no limit."""
    text = env(name, default, about).strip().lower()
    number, _, period = text.partition("/")
    if text == "0":
        return 0, 1
    if not (number.isascii() and number.isdecimal() and period in PERIODS):
        said = f"{name} is {text!r}; set it to a rate like {default} (s, m, h or d), or to 0"
        raise BadSetting(f"{said}: {about}")
    return int(number), PERIODS[period]


def env_choice(name: str, default: str, choices: Sequence[str], about: str) -> str:
    """One of `choices`, in upper case."""
    text = env(name, default, about).strip().upper()
    if text not in choices:
        raise BadSetting(f"{name} is {text!r}; set it to one of {', '.join(choices)}: {about}")
    return text


def env_list(name: str, default: str, about: str) -> list[str]:
    """Values separated by commas or new lines; blanks are dropped."""
    parts = env(name, default, about).replace("\n", ",").split(",")
    return [part.strip() for part in parts if part.strip()]


def env_places(name: str, about: str) -> Places:
    """Networks and addresses, `10.2.0.0/16`, and host names; `.example.org` is whatever ends with it."""
    networks, names = [], []
    for part in env_list(name, "", about):
        try:
            networks.append(ipaddress.ip_network(part.strip("[]"), strict=False))
        except ValueError:
            if not HOST.fullmatch(part):
                said = f"{name} has {part!r}; set it to networks (10.2.0.0/16) and host names"
                raise BadSetting(f"{said}: {about}") from None
            names.append(part.lower())
    return Places(tuple(networks), tuple(names))


def usable_folder(name: str, folder: Path) -> Path:
    """The folder that `name` is set to, made if it is missing and its parent may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        said = f"{name}: {str(folder)!r} can't be used: {_why(error)}"
        raise BadSetting(f"{said}; set {name} to a folder that you may write") from error
    return folder


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def child_environment() -> dict[str, str]:
    """This process's environment for a child: it imports from, and is configured by, the same."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def required(name: str, about: str) -> str:
    """A variable that has no safe default; its absence stops the start with the next step."""
    value = env(name, None, about)
    if not value:
        raise MissingSetting(f"set {name} (or {name}_FILE to a file that holds it): {about}")
    return value
