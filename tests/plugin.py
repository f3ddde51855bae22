"""The test run's own rules: which database, no network, what is left out unless asked for.

Loaded with `-p tests.plugin` (pyproject.toml), so that PostgreSQL runs before Django's settings
are read. `FL_TEST_DB=postgres` runs the suite on PostgreSQL instead of SQLite.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings as hypothesis_settings

from tests.system.servers import Postgres, Redis, reap

LEFT_OUT = ("heavy", "gpu", "faults")
TIMEOUT_SECONDS = 300.0
hypothesis_settings.register_profile("untimed", deadline=None)  # machines are slow at times
hypothesis_settings.load_profile("untimed")
_suite: list[Postgres] = []  # the server that Django's own test database is on


# A wrapper: those run before pytest-django's hook of the same name, which reads the settings.
@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Iterator[None]:
    reap()
    wanted = os.environ.get("FL_TEST_DB", "sqlite")
    if wanted not in {"sqlite", "postgres"}:
        raise pytest.UsageError(f"FL_TEST_DB is sqlite or postgres, not {wanted!r}")
    if wanted == "postgres" and not early_config.known_args_namespace.help:
        _suite.append(Postgres())
        os.environ["FL_DATABASE_URL"] = _suite[0].url
    else:
        os.environ.pop("FL_DATABASE_URL", None)
    return (yield)


def pytest_unconfigure() -> None:
    while _suite:
        _suite.pop().stop()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.allow_hosts is None and not option.force_enable_socket:
        option.allow_hosts = "127.0.0.1,::1,localhost"
        option.allow_unix_socket = True
    if option.timeout is None:
        option.timeout = TIMEOUT_SECONDS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items) and config.option.markexpr:
        _skip_without_cuda(items)
    if config.option.markexpr:
        return
    left_out = [i for i in items if any(i.get_closest_marker(name) for name in LEFT_OUT)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _skip_without_cuda(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no CUDA device here")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for processes that a test starts; `create()` makes a database."""
    if _suite:
        yield _suite[0]
        return
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> str:
    """A database on it, as `FL_DATABASE_URL` takes it."""
    return postgres.url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(redis_server: Redis) -> str:
    """A Redis on loopback, as `FL_REDIS_URL` takes it."""
    return redis_server.url
