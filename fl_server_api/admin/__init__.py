"""Django admin; its modules are imported here as soon as fl_server_ai.notifications exists."""
