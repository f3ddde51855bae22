"""Clients that are logged in; and a note of every refusal that a test was answered with."""

from collections.abc import Callable, Iterator

import pytest
from django.core.handlers.base import BaseHandler
from rest_framework.test import APIClient

from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue
from tests.api.provoked import record

Login = Callable[[User | None], APIClient]


@pytest.fixture(scope="session", autouse=True)
def refusals() -> Iterator[None]:
    """Over all of Django's own requests: what `test_error_codes.py` counts up at the end."""
    original = BaseHandler.get_response
    BaseHandler.get_response = record(original)  # type: ignore[method-assign]
    yield
    BaseHandler.get_response = original  # type: ignore[method-assign]


@pytest.fixture
def login() -> Login:
    """A client with a token of this user; of nobody for None."""

    def make(user: User | None) -> APIClient:
        client = APIClient(raise_request_exception=False)
        if user is not None:
            client.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=user)}")
        return client

    return make
