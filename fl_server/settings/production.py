"""docker-compose.yml: PostgreSQL, Redis, Celery, and a proxy that ends TLS."""

from fl_server.settings.base import *
from fl_server.settings.env import env_bool, env_list, required

SECRET_KEY = required("FL_SECRET_KEY", "Signs sessions and keys token digests.")
SECRET_KEY_FALLBACKS = env_list("FL_SECRET_KEY_FALLBACKS", "", "Former keys, while rotating.")
required("FL_DATABASE_URL", "postgres://user:password@host/name")

SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_SSL_REDIRECT = env_bool(
    "FL_SSL_REDIRECT", default=True, about="Redirect plain HTTP to HTTPS."
)
SECURE_HSTS_SECONDS = 31_536_000
SECURE_HSTS_INCLUDE_SUBDOMAINS = True
SECURE_HSTS_PRELOAD = True
SESSION_COOKIE_SECURE = True
CSRF_COOKIE_SECURE = True
CACHES["default"] = {  # one count for all processes
    "BACKEND": "django.core.cache.backends.redis.RedisCache",
    "LOCATION": FL_REDIS_URL,
    "KEY_PREFIX": "fl",
    "OPTIONS": {"socket_timeout": 1, "socket_connect_timeout": 1},
}
STORAGES["staticfiles"] = {
    "BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage",
}
WHITENOISE_USE_FINDERS = False
