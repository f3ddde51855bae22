"""What must be in order before the server starts: every plug-in can be used."""

from dataclasses import fields
from typing import Any

from django.core.checks import Error

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.containers.container import CONTAINERS
from fl_server_ai.notifications.transports import TRANSPORTS
from fl_server_ai.services.training_options import TRAINER_FIELDS
from fl_server_ai.uncertainty import UNCERTAINTY
from fl_server_core.plugins import faults

HINT = "Repair it or take it away, then start again: docs/how-to/add-an-aggregator.md"
TAKEN = TRAINER_FIELDS | {"client_config", "uncertainty"}


def plugin_faults() -> list[str]:
    """Why plug-ins can't be used, one line each; loads all of them, which has no effect the second time."""
    for registry in (STRATEGIES, UNCERTAINTY, TRANSPORTS, CONTAINERS):
        list(registry)
    found = [str(fault) for fault in faults()]
    for name in STRATEGIES:
        if hidden := TAKEN & {option.name for option in fields(STRATEGIES[name].Options)}:
            said = f"its option {min(hidden)!r} is one that every training has; rename it"
            found.append(f"strategy {name}: {said}")
    return found


def plugins_check(**_: Any) -> list[Error]:
    """A system check: `manage.py check` and every command that runs checks stop at a broken plug-in."""
    return [Error(said, hint=HINT, id="fl_server.E001") for said in plugin_faults()]
