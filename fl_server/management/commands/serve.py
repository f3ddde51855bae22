"""`manage.py serve`: the whole server in one process, plus one child for tensors and one for models."""

import os
import signal
import threading
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from fl_server.bootstrap import ensure_admin, migrate
from fl_server.embedded.background import notifier, reconciler
from fl_server.embedded.executor import Executor
from fl_server.embedded.lock import DataDirBusy, DataDirLock
from fl_server.embedded.tls import Certificates, certificates
from fl_server.embedded.web import Web
from fl_server_ai.checks import plugin_faults
from fl_server_ai.dispatch import INFERENCE, PROCESS, register_sender
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.reconciler import event_lease_drop
from fl_server_api.requests import wsgi_application
from fl_server_core.services.inference import job_lease_drop


class Command(BaseCommand):
    """Migrate, make an admin if there is none, and serve until SIGTERM or Ctrl-C."""

    help = "Serve everything from one process; its state lies below FL_DATA_DIR."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument(
            "--threads",
            type=int,
            default=settings.FL_WEB_THREADS,
            help="requests at a time; who waits or sends much takes none of them",
        )
        parser.add_argument(
            "--self-signed", action="store_true", help="HTTPS with a CA made on the first start"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if settings.FL_EXECUTOR != "embedded":
            raise CommandError(
                f"{settings.SETTINGS_MODULE} has no embedded executor; "
                "use DJANGO_SETTINGS_MODULE=fl_server.settings.embedded"
            )
        if faults := plugin_faults():
            raise CommandError("broken plug-ins; nothing was started\n" + "\n".join(faults))
        try:
            lock = DataDirLock(settings.FL_DATA_DIR)
        except DataDirBusy as error:
            raise CommandError(str(error)) from error
        host, port = options["host"], options["port"]
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        self._prepare()
        settings.ALLOWED_HOSTS.append(f"[{host}]" if ":" in host else host)
        tls = certificates(settings.FL_DATA_DIR / "tls", host) if options["self_signed"] else None
        settings.SESSION_COOKIE_SECURE = settings.CSRF_COOKIE_SECURE = tls is not None
        settings.FL_WEB_THREADS = options["threads"]
        self._serve(host, port, options["threads"], tls, stop)
        lock.release()
        self.stdout.write("Stopped.")
        self.stdout.flush()
        os._exit(0)  # threads that hold a long-poll would be waited for; what counts is committed

    def _prepare(self) -> None:
        if applied := migrate():
            self.stdout.write(f"Prepared the database ({applied} migrations).")
        if admin := ensure_admin():
            shown = admin.password or "as in FL_ADMIN_PASSWORD"
            self.stdout.write(f"Made the user {admin.username!r}, password: {shown}")
            if admin.password:
                self.stdout.write(
                    "It is shown only now; `manage.py changepassword admin` sets another."
                )

    def _serve(
        self, host: str, port: int, threads: int, tls: Certificates | None, stop: threading.Event
    ) -> None:
        sweeping, delivering = reconciler(), notifier()

        def send(task: str, ids: list[int]) -> None:
            if task == PROCESS:
                executor.submit(ids[0])
            elif task == INFERENCE:
                asking.submit(ids[0])
            else:
                delivering.hint()

        executor = Executor(
            module="fl_server.embedded.child",
            drop_lease=lambda pk: event_lease_drop(event_id=pk),
            on_wake=wakeups.wake,
            on_hint=send,
        )
        asking = Executor(
            module="fl_server.embedded.inference_child",
            drop_lease=lambda pk: job_lease_drop(job_id=pk),
            lazy=True,  # an aggregation is not waited for, and who asks nothing pays no memory
            on_wake=wakeups.wake,
            on_hint=send,
        )
        register_sender("embedded", send)
        web = Web((host, port), wsgi_application(), threads=threads, tls=tls)
        try:
            web.open()
        except OSError as error:
            raise CommandError(f"can't listen at {host}:{port}: {error}") from error
        executor.start()
        asking.start()
        sweeping.start()
        delivering.start()
        self._announce(host, web.port, tls)
        stop.wait()
        self.stdout.write("Stopping ...")
        web.close()
        sweeping.stop()
        delivering.stop()
        asking.stop()
        executor.stop()

    def _announce(self, host: str, port: int, tls: Certificates | None) -> None:
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104
        base = f"{'https' if tls else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"
        if tls:
            self.stdout.write(f"CA certificate for clients: {tls.ca}")
            self.stdout.write(f"SHA-256 of it: {tls.fingerprint}")
        self.stdout.write(f"Admin: {base}/admin/")
        self.stdout.write(f"API:   {base}/api/   its description: {base}/api/schema/swagger-ui/")
        self.stdout.write(f"Serving at {base}, state in {settings.FL_DATA_DIR}. Ctrl-C stops it.")
        self.stdout.flush()
