"""`manage.py bootstrap`: what a deployment needs before its first start, and after each upgrade."""

from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand

from fl_server.bootstrap import ensure_admin, migrate


class Command(BaseCommand):
    """Migrate, make an admin if there is none, collect static files. Safe to repeat."""

    help = "Prepare database, first admin and static files; safe to repeat."

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"{migrate()} migrations applied")
        if admin := ensure_admin():
            shown = admin.password or "as in FL_ADMIN_PASSWORD"
            self.stdout.write(f"made the user {admin.username!r}, password: {shown}")
        call_command("collectstatic", interactive=False, verbosity=0)
        self.stdout.write(f"static files are in {settings.STATIC_ROOT}")
