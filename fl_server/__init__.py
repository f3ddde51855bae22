"""Puts things together: settings, URLs, the Celery app, `manage.py serve`. Nobody imports it."""
