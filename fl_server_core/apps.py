from django.apps import AppConfig

from fl_server_core.killpoints import refuse_in_production


class CoreConfig(AppConfig):
    name = "fl_server_core"
    verbose_name = "Federated learning"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        refuse_in_production()
