"""From nothing to a server that can start: migrations and the first admin. Safe to repeat."""

import secrets
from dataclasses import dataclass

from django.conf import settings
from django.core.management import call_command
from django.db import connections
from django.db.migrations.executor import MigrationExecutor

from fl_server_core.models import User

ADMIN = "admin"


@dataclass(frozen=True)
class Admin:
    """The account that was made now; `password` only if nobody chose one."""

    username: str
    password: str | None


def migrate() -> int:
    """Apply what is missing and return how many migrations that were."""
    connection = connections["default"]
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if plan:
        call_command("migrate", interactive=False, verbosity=0)
    return len(plan)


def ensure_admin() -> Admin | None:
    """Make a superuser if there is none; None if there is one."""
    if User.objects.filter(is_superuser=True).exists():
        return None
    chosen: str | None = settings.FL_ADMIN_PASSWORD
    password = chosen or secrets.token_urlsafe(12)
    User.objects.create_superuser(ADMIN, password=password, actor=True)
    return Admin(ADMIN, None if chosen else password)
