"""What every way of running has in common."""

from pathlib import Path

import dj_database_url

from fl_server.settings.env import (
    BadSetting,
    env,
    env_bool,
    env_choice,
    env_int,
    env_list,
    env_places,
    env_rate,
)

BASE_DIR = Path(__file__).resolve().parent.parent.parent
FL_DATA_DIR = Path(
    env("FL_DATA_DIR", "./data", "Folder of all state of the embedded server.")
).resolve()

DEBUG = False
ALLOWED_HOSTS = env_list("FL_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]", "Host names served.")
CSRF_TRUSTED_ORIGINS = env_list(
    "FL_TRUSTED_ORIGINS", "", "Origins that may post forms, with scheme."
)

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "fl_server_core",
    "fl_server_ai",
    "fl_server_api",
    "fl_server",
]
MIDDLEWARE = [
    "fl_server_api.middleware.RequestIdMiddleware",
    "fl_server_api.middleware.HostMiddleware",
    "fl_server_api.middleware.HeadMiddleware",
    "fl_server_api.middleware.StagedFilesMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
CSRF_FAILURE_VIEW = "fl_server_api.errors.csrf_failure"
ROOT_URLCONF = "fl_server.urls"
WSGI_APPLICATION = "fl_server.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# --- database ---------------------------------------------------------------------------------

_DATABASE_URL = env(
    "FL_DATABASE_URL", None, "postgres://user:password@host/name; SQLite in FL_DATA_DIR otherwise."
)


def sqlite(path: Path) -> dict[str, object]:
    """WAL lets readers pass writers; FULL makes an acknowledged commit survive a power cut."""
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": path,
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL;PRAGMA synchronous=FULL;",
        },
    }


FL_DATABASE_CONNECTIONS = env_int(
    "FL_DATABASE_CONNECTIONS",
    0,
    "Connections that one process has to PostgreSQL at a time, 10 or more; its other threads wait for them. "
    "0 = no limit.",
)


def _from_url(url: str) -> dict[str, object]:
    try:
        # Connections are not kept: hundreds of threads, one each.
        found = dict(dj_database_url.parse(url))
    except ValueError:  # its text and its traceback would quote the password
        said = "set it to postgres://user:password@host/name"
        raise BadSetting(f"FL_DATABASE_URL is no address of a database; {said}") from None
    if FL_DATABASE_CONNECTIONS and found["ENGINE"] == "django.db.backends.postgresql":
        found["ENGINE"] = "fl_server.postgres"
    return found


DATABASES: dict[str, object] = {
    "default": _from_url(_DATABASE_URL) if _DATABASE_URL else sqlite(FL_DATA_DIR / "db.sqlite3")
}

# --- people -----------------------------------------------------------------------------------

AUTH_USER_MODEL = "fl_server_core.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
FL_OPEN_REGISTRATION = env_bool(
    "FL_OPEN_REGISTRATION", default=False, about="1 lets anyone register a plain user."
)
FL_ADMIN_PASSWORD = env(
    "FL_ADMIN_PASSWORD", None, "Password of the first admin; made up and shown once otherwise."
)
FL_TOKEN_DAYS = env_int("FL_TOKEN_DAYS", 365, "Days until a new token expires; 0 = never.")

CACHES: dict[str, dict[str, object]] = {  # counts wrong passwords and requests
    "default": {
        "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
        "OPTIONS": {"MAX_ENTRIES": 100_000},
    }
}

# --- how often: number/s, /m, /h or /d; 0 = no limit ---------------------------------------------

FL_RATE_PASSWORDS = env_rate(
    "FL_RATE_PASSWORDS",
    "600/m",
    "Passwords that are tried from one address, right or wrong; tokens are not counted. 0 = no limit.",
)
FL_RATE_REGISTRATIONS = env_rate(
    "FL_RATE_REGISTRATIONS",
    "2000/h",
    "Registrations from one address where these are open; those by admins are not counted.",
)
FL_RATE_TOKENS = env_rate("FL_RATE_TOKENS", "600/h", "Tokens that one user makes.")
FL_RATE_UPLOADS = env_rate(
    "FL_RATE_UPLOADS",
    "3000/m",
    "Models, updates, metrics and results that one user sends, and resumable uploads that he announces.",
)
FL_RATE_PIECES = env_rate(
    "FL_RATE_PIECES",
    "6000/m",
    "Pieces below 64 KiB of resumable uploads that one user sends; larger ones are not counted.",
)
FL_RATE_INFERENCES = env_rate(
    "FL_RATE_INFERENCES", "6000/m", "Questions that one user puts to models, calibrations included."
)

# --- weights ----------------------------------------------------------------------------------

FL_STAGING_DIR = Path(
    env(
        "FL_STAGING_DIR",
        str(FL_DATA_DIR / "staging"),
        "Unfinished files; same disk as the weights.",
    )
)
FL_MAX_MODEL_BYTES = env_int("FL_MAX_MODEL_BYTES", 16 * 2**30, "Largest weight file, in bytes.")
FL_UPLOADS = env_int("FL_UPLOADS", 20, "Resumable uploads that one user may have unused at a time.")
FL_USER_BYTES = env_int(
    "FL_USER_BYTES",
    2**40,
    "Bytes of one user's models, as they were uploaded, of what he reports on them, and of unused uploads; 0 = no "
    "limit. An admin may give a user another number.",
)
FL_MAX_INPUT_BYTES = env_int(
    "FL_MAX_INPUT_BYTES", 64 * 2**20, "Largest input of an inference, in bytes."
)
FL_MAX_IMAGE_PIXELS = env_int(
    "FL_MAX_IMAGE_PIXELS",
    50_000_000,
    "Most pixels of an image that is sent to a model, by its header, before it is decoded.",
)
FL_AGGREGATION_DEVICE = env("FL_AGGREGATION_DEVICE", "auto", "auto, cpu, cuda or cuda:<n>.")
FL_SHARED_ROUND_BYTES = env_int(
    "FL_SHARED_ROUND_BYTES",
    4 * 2**30,
    "From so many bytes of updates on, all aggregation workers share a round; 0 = never.",
)
FL_WEIGHTS_DIR = env("FL_WEIGHTS_DIR", str(FL_DATA_DIR / "weights"), "Folder of stored weights.")
_BUCKET = env("FL_S3_BUCKET", None, "Bucket for weights; needs the extra `s3`. Folder otherwise.")
_WEIGHTS = (
    {
        "BACKEND": "storages.backends.s3.S3Storage",
        "OPTIONS": {
            "bucket_name": _BUCKET,
            "endpoint_url": env("FL_S3_ENDPOINT", None, "URL of an S3 API other than Amazon's."),
            "file_overwrite": False,
        },
    }
    if _BUCKET
    else {
        "BACKEND": "fl_server_core.storage.DurableStorage",
        "OPTIONS": {"location": FL_WEIGHTS_DIR},
    }
)
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    "weights": _WEIGHTS,
}
FILE_UPLOAD_HANDLERS = ["fl_server_api.uploads.StagingUploadHandler"]
DATA_UPLOAD_MAX_MEMORY_SIZE = 4 * 2**20
DATA_UPLOAD_MAX_NUMBER_FIELDS = 5_000

# --- plug-ins ---------------------------------------------------------------------------------

_PLUGINS = env(
    "FL_PLUGIN_DIR",
    None,
    "Folder of plug-ins: each `*.py` file in it is run as part of the server, in web and workers alike.",
)
FL_PLUGIN_DIR = Path(_PLUGINS).resolve() if _PLUGINS else None

# --- work -------------------------------------------------------------------------------------

FL_EXECUTOR = "celery"  # "embedded" in `manage.py serve`, "none" in unit tests
FL_REDIS_URL = env(
    "FL_REDIS_URL", "redis://localhost:6379/0", "Broker and wake-ups; holds no truth."
)
FL_LEASE_SECONDS = env_int("FL_LEASE_SECONDS", 60, "How long silent work belongs to its worker.")
FL_EVENT_ATTEMPTS = env_int("FL_EVENT_ATTEMPTS", 3, "Attempts at one piece of work before ERROR.")
FL_SWEEP_SECONDS = env_int("FL_SWEEP_SECONDS", 5, "Seconds between two sweeps of the reconciler.")
FL_ROUND_SECONDS = env_int(
    "FL_ROUND_SECONDS", 86_400, "Default of a training's `round_deadline`, in seconds."
)
FL_CHECK_SECONDS = env_int(
    "FL_CHECK_SECONDS", 120, "Seconds that a strategy may take to check one update."
)
FL_SILENT_SECONDS = env_int(
    "FL_SILENT_SECONDS", 90, "After so many seconds without a request a site counts as silent."
)
FL_INFERENCE_WAIT = env_int(
    "FL_INFERENCE_WAIT", 20, "Seconds that `POST inference/` waits before it answers 202."
)
FL_INFERENCE_SECONDS = env_int(
    "FL_INFERENCE_SECONDS", 30, "Seconds that a model may take for one inference, loading included."
)
FL_INFERENCE_MEMORY = env_int(
    "FL_INFERENCE_MEMORY", 4 * 2**30, "Bytes that a model may take while it is run, beside torch."
)
FL_INFERENCE_CHILDREN = env_int(
    "FL_INFERENCE_CHILDREN", 4, "Models that a worker keeps warm, one process each."
)
FL_INFERENCE_THREADS = env_int(
    "FL_INFERENCE_THREADS", 0, "Threads that a model is run with; 0 = as many as there are cores."
)
FL_INFERENCE_QUEUE = env_int(
    "FL_INFERENCE_QUEUE", 100, "Questions to models that one user may have waiting at a time."
)
FL_INFERENCE_DEVICE = env("FL_INFERENCE_DEVICE", "cpu", "Where models are run: cpu or cuda:<n>.")
FL_MAX_JSON_NUMBERS = 1_000_000  # of an answer; larger ones are binary
CELERY_BROKER_URL = FL_REDIS_URL
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_RESULT_BACKEND = None
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False  # LOGGING below is meant
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = (
    False  # the row is ours, not the message
)
# A process of the pool imports torch before it is up. With Celery's 4 s one that has died (out of memory)
# is followed, on a busy machine, by others that are all killed for being late, for ever.
CELERY_WORKER_PROC_ALIVE_TIMEOUT = 300.0
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None  # a worker waits for its broker as long as it takes
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "socket_timeout": 5,
    "socket_connect_timeout": 1,
    "max_retries": 0,
    # Redelivery of what isn't acknowledged. Early is harmless: the second worker finds no row to claim.
    "visibility_timeout": 3_600,
}
CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_TASK_ROUTES = {
    "fl_server_ai.trainer.tasks.process_trainer_task": {"queue": "aggregation"},
    "fl_server_ai.trainer.tasks.process_slice": {"queue": "aggregation"},
    "fl_server_ai.inference.tasks.run_inference": {"queue": "inference"},
}
CELERY_BEAT_SCHEDULE = {
    "reconcile": {
        "task": "fl_server_ai.trainer.tasks.reconcile",
        "schedule": FL_SWEEP_SECONDS,
        "options": {"expires": FL_SWEEP_SECONDS},
    }
}

# --- webhooks ---------------------------------------------------------------------------------

FL_WEBHOOK_ALLOW_PRIVATE = env_bool(
    "FL_WEBHOOK_ALLOW_PRIVATE",
    default=False,
    about="1 allows webhooks to loopback and private addresses.",
)
FL_WEBHOOK_ALLOW = env_places(
    "FL_WEBHOOK_ALLOW",
    "Networks, like 10.2.0.0/16, and host names, like hooks.example.org or .example.org for all below it, that "
    "webhooks may go to although their addresses are private. List only names whose DNS you trust.",
)
FL_WEBHOOK_ATTEMPTS = env_int("FL_WEBHOOK_ATTEMPTS", 8, "Attempts at an unreachable webhook.")
FL_WEBHOOK_PAUSE = env_int(
    "FL_WEBHOOK_PAUSE",
    5,
    "Seconds after the first attempt at an unreachable webhook; twice as long after each, up to 300.",
)
FL_WEBHOOK_CONNECT_SECONDS = 5.0
FL_WEBHOOK_READ_SECONDS = 10.0

# --- API --------------------------------------------------------------------------------------

FL_KILL_POINTS: Path | None = None  # no variable sets it: fl_server_core/killpoints.py
FL_WEB_THREADS = env_int(
    "FL_WEB_THREADS", 16, "Threads of one web process for requests that are quick."
)
FL_TRANSFER_THREADS = env_int(
    "FL_TRANSFER_THREADS",
    64,
    "Threads of one web process for bodies of more than 64 KiB, streams and questions to models.",
)
FL_POLLS = env_int("FL_POLLS", 5_000, "Long-polls that one web process holds; they take no thread.")
FL_STALLED_SECONDS = env_int(
    "FL_STALLED_SECONDS", 30, "Seconds of silence after which a request's body is given up."
)
FL_SLOWEST_TRANSFER = env_int(
    "FL_SLOWEST_TRANSFER", 1_000, "Bytes a second; slower transfers are given up."
)
FL_POLL_SECONDS = env_int("FL_POLL_SECONDS", 25, "Longest wait of `GET tasks/`, in seconds.")
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "fl_server_api.auth.TokenAuthentication",
        "fl_server_api.auth.BasicAuthentication",
        "fl_server_api.auth.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "fl_server_api.negotiation.LenientNegotiation",
    "EXCEPTION_HANDLER": "fl_server_api.errors.handle",
    "URL_FORMAT_OVERRIDE": None,
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "FL server",
    "DESCRIPTION": "Federated learning over REST. Weights travel as safetensors or npz, never as code.",
    "VERSION": "1.0.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_NAME_OVERRIDES": {
        "ModelTypeEnum": "fl_server_core.models.weights.ModelType",
        "TrainingStateEnum": "fl_server_core.lifecycle.TrainingState",
        "TaskStateEnum": "fl_server_core.lifecycle.TaskState",
        "TaskKindEnum": "fl_server_core.lifecycle.TaskKind",
        "UpdateStateEnum": "fl_server_core.lifecycle.UpdateState",
        "AnswerStateEnum": [("task", "task"), ("wait", "wait"), ("done", "done")],
    },
    "PREPROCESSING_HOOKS": ["fl_server_api.openapi.without_v1"],
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "fl_server_api.openapi.with_pages",
        "fl_server_api.openapi.with_links",
        "fl_server_api.openapi.with_bodies_of_delete",
    ],
}

# --- the rest ---------------------------------------------------------------------------------

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"
STATIC_ROOT = FL_DATA_DIR / "static"
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
X_FRAME_OPTIONS = "DENY"
_WARNING = {"level": "WARNING"}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "%(asctime)s %(levelname)s %(name)s %(asked)s%(message)s"},
    },
    "filters": {"request": {"()": "fl_server_api.request_log.RequestFilter"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "line",
            "filters": ["request"],
        }
    },
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "celery": {"level": "INFO"},
        "uvicorn.access": {"level": "INFO"},
        "uvicorn.error": {"level": "ERROR"},  # its warnings are about what strangers send
        # Three lines for every sweep say nothing; what fails is a warning.
        **dict.fromkeys(("celery.beat", "celery.app.trace", "celery.worker.strategy"), _WARNING),
        "fl": {
            "handlers": ["stderr"],
            "level": env_choice(
                "FL_LOG_LEVEL",
                "INFO",
                ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
                "Level of the loggers fl.server and fl.celery.",
            ),
            "propagate": False,
        },
    },
}
