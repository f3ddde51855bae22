from typing import Any

from django.apps import AppConfig
from django.core import checks


class AIConfig(AppConfig):
    name = "fl_server_ai"

    def ready(self) -> None:
        checks.register(_plugins)


def _plugins(**_: Any) -> list[checks.CheckMessage]:
    from fl_server_ai.checks import plugins_check  # loads every registry: only where it is asked

    return list(plugins_check())
