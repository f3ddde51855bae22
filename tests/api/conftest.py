"""Clients that are logged in."""

from collections.abc import Callable

import pytest
from rest_framework.test import APIClient

from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue

Login = Callable[[User | None], APIClient]


@pytest.fixture
def login() -> Login:
    """A client with a token of this user; of nobody for None."""

    def make(user: User | None) -> APIClient:
        client = APIClient(raise_request_exception=False)
        if user is not None:
            client.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=user)}")
        return client

    return make
