from django.apps import AppConfig


class AIConfig(AppConfig):
    name = "fl_server_ai"
