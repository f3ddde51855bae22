from django.apps import AppConfig
from django.conf import settings

from fl_server_core.killpoints import refuse_in_production
from fl_server_core.plugins import use_folder


class CoreConfig(AppConfig):
    name = "fl_server_core"
    verbose_name = "Federated learning"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        refuse_in_production()
        use_folder(settings.FL_PLUGIN_DIR)
