"""`manage.py serve`: SQLite, an executor in the process, everything under FL_DATA_DIR."""

import secrets

from fl_server.settings.base import *
from fl_server.settings.env import env

FL_EXECUTOR = "embedded"


def _own_secret() -> str:
    """Made once and kept under FL_DATA_DIR, readable by its owner only."""
    path = FL_DATA_DIR / "secret_key"
    if not path.exists():
        FL_DATA_DIR.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(50), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


SECRET_KEY = env("FL_SECRET_KEY", None, "Signs sessions and keys token digests.") or _own_secret()
