"""Whether a plug-in's class can be a strategy at all: it can be made, described and offered."""

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from fl_server_ai.aggregation.options import parse_options, schema
from fl_server_ai.aggregation.strategy import RESERVED, Extra, Strategy
from fl_server_core.exceptions import Invalid

EXTRA_NAME = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class UnfitStrategy(Exception):
    """It would make the server stumble; says how to put it right."""


def check_fit(name: str, kind: type[Any]) -> None:
    """Raise `UnfitStrategy` for what could not be listed or created by name. Needs no torch."""
    if not issubclass(kind, Strategy):
        raise UnfitStrategy(f"{name!r} is no class below fl_server_ai.aggregation.Strategy")
    if not 1 <= len(name) <= 64:
        raise UnfitStrategy(f"the name {name[:80]!r} has {len(name)} characters; 1 to 64 will do")
    options = kind.Options
    if not is_dataclass(options) or not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise UnfitStrategy(f"{name}.Options is no frozen dataclass")
    for option in fields(options):
        if option.default is MISSING and option.default_factory is MISSING:
            raise UnfitStrategy(f"{name}: the option {option.name!r} needs a default")
    try:
        json.dumps(schema(options), allow_nan=False)
        given = parse_options(options, {})
        strategy = kind(given)
        check_extras(name, strategy.extras())
        json.dumps(strategy.client_config(), allow_nan=False)
    except (KeyError, TypeError, ValueError, AttributeError, NameError, Invalid) as error:
        said = f"{type(error).__name__}: {error}"
        raise UnfitStrategy(f"{name} can't be described or made with defaults: {said}") from error
    if not isinstance(kind.paper, str):
        raise UnfitStrategy(f"{name}.paper is an arXiv id or a URL")


def check_extras(name: str, extras: Iterable[Extra]) -> None:
    """Raise `UnfitStrategy` for extras by whose names no update could bring them."""
    for extra in extras:
        if not EXTRA_NAME.fullmatch(extra.name):
            raise UnfitStrategy(
                f"{name}: the extra {extra.name!r} must be <namespace>.<name>, of letters, digits, _ and -"
            )
        namespace = extra.name.partition(".")[0]
        if namespace in RESERVED:
            raise UnfitStrategy(
                f"{name}: the extra {extra.name!r} is in the namespace {namespace!r}, which is reserved, like "
                f"{', '.join(sorted(RESERVED - {namespace}))}; take another"
            )
