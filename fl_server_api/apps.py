from django.apps import AppConfig


class APIConfig(AppConfig):
    name = "fl_server_api"
