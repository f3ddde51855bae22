from importlib import import_module

from django.apps import AppConfig
from django.conf import settings


class ServerConfig(AppConfig):
    name = "fl_server"

    def ready(self) -> None:
        from fl_server.embedded.hints import ignore_hint
        from fl_server_ai.dispatch import register_sender

        register_sender("embedded", ignore_hint)
        if settings.FL_EXECUTOR == "celery":
            import_module("fl_server.celery")  # else hints would go to Celery's default broker
