"""`manage.py serve`: SQLite, an executor in the process, everything under FL_DATA_DIR."""

import contextlib
import os
import secrets
import sys

from fl_server.settings.base import *
from fl_server.settings.env import env, usable_folder

FL_EXECUTOR = "embedded"


_HELP = not {"-h", "--help", "--version"}.isdisjoint(sys.argv) or sys.argv[1:2] in (
    ["help"],
    ["version"],
)
if not _HELP:  # which leaves nothing behind
    usable_folder("FL_DATA_DIR", FL_DATA_DIR)
    STATIC_ROOT.mkdir(exist_ok=True)  # whitenoise warns where there is none


def _own_secret() -> str:
    """Made once and kept under FL_DATA_DIR, readable by its owner only."""
    if _HELP:
        return secrets.token_urlsafe(50)
    path = FL_DATA_DIR / "secret_key"
    if not path.exists():
        new = path.with_name(f"secret_key.{os.getpid()}")
        new.touch(mode=0o600)
        new.write_text(secrets.token_urlsafe(50), encoding="utf-8")
        with contextlib.suppress(FileExistsError):  # another process was first; its key counts
            path.hardlink_to(new)
        new.unlink()
    return path.read_text(encoding="utf-8").strip()


SECRET_KEY = env("FL_SECRET_KEY", None, "Signs sessions and keys token digests.") or _own_secret()
