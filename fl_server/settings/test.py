"""Tests: everything under a temporary folder; no queue, so that a test says when work is done."""

import tempfile
from pathlib import Path

from fl_server.settings.base import *

SECRET_KEY = "only for tests"
FL_DATA_DIR = Path(tempfile.mkdtemp(prefix="fl-test-"))
FL_EXECUTOR = "none"
FL_INFERENCE_WAIT = 0
FL_INFERENCE_THREADS = 1
FL_STAGING_DIR = FL_DATA_DIR / "staging"
STATIC_ROOT = FL_DATA_DIR / "static"
STATIC_ROOT.mkdir()  # whitenoise warns where there is none
STORAGES["weights"] = {
    "BACKEND": "fl_server_core.storage.DurableStorage",
    "OPTIONS": {"location": FL_DATA_DIR / "weights"},
}
if "sqlite" in DATABASES["default"]["ENGINE"]:  # type: ignore[index]
    # A file, not memory: several connections see it, as they do in real life.
    DATABASES["default"] = {
        **sqlite(FL_DATA_DIR / "db.sqlite3"),
        "TEST": {"NAME": FL_DATA_DIR / "test.sqlite3"},
    }
    # Like the PostgreSQL of the tests: no test cuts the power.
    DATABASES["default"]["OPTIONS"]["init_command"] += "PRAGMA synchronous=OFF;"  # type: ignore[index]
ALLOWED_HOSTS = ["testserver", "localhost", "127.0.0.1"]
CACHES["default"] = {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
# Looks for a static file when it is asked for, not for all of them in the client of each test.
WHITENOISE_AUTOREFRESH = True
