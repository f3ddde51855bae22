from django.apps import AppConfig


class ServerConfig(AppConfig):
    name = "fl_server"
