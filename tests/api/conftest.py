"""Clients that are logged in; and a note of every refusal that a test was answered with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.core.handlers.base import BaseHandler
from rest_framework.test import APIClient

from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue
from tests.api.provoked import record

ELSEWHERE = {"test_hostile_uploads.py"}  # in a lane of its own (Makefile)
Login = Callable[[User | None], APIClient]


@pytest.fixture(scope="session", autouse=True)
def refusals() -> Iterator[None]:
    """Over all of Django's own requests: what `test_error_codes.py` counts up at the end."""
    original = BaseHandler.get_response
    BaseHandler.get_response = record(original)  # type: ignore[method-assign]
    yield
    BaseHandler.get_response = original  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What looks back at all tests of this folder comes last, or not at all where some are not run."""
    here = Path(__file__).parent
    looks_back = [item for item in items if item.get_closest_marker("whole_folder")]
    for item in looks_back:
        items.remove(item)
    run = {item.path for item in items}
    whole = {path for path in here.glob("test_*.py") if path.name not in ELSEWHERE}
    if whole <= run and not config.option.keyword and not config.option.markexpr:
        items += looks_back
    elif looks_back:
        config.hook.pytest_deselected(items=looks_back)


@pytest.fixture
def login() -> Login:
    """A client with a token of this user; of nobody for None."""

    def make(user: User | None) -> APIClient:
        client = APIClient(raise_request_exception=False)
        if user is not None:
            client.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=user)}")
        return client

    return make
