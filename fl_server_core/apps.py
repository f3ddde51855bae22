from django.apps import AppConfig


class CoreConfig(AppConfig):
    name = "fl_server_core"
    verbose_name = "Federated learning"
    default_auto_field = "django.db.models.BigAutoField"
