"""Accounts: registering one, and looking at one's own."""

import uuid
from typing import Any

from fl_client.transport import Transport


class Users:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def register(
        self,
        username: str,
        password: str,
        *,
        actor: bool = False,
        client: bool = False,
        message_endpoint: str | None = None,
        **more: str,
    ) -> dict[str, Any]:
        """Create an account; the answer's `token` is shown this once.

        `actor` creates trainings, `client` takes part in them. `more` are further fields, such as
        `email`. NotPermitted where registration is closed and no admin asks.
        """
        body: dict[str, Any] = {
            "username": username,
            "password": password,
            "actor": actor,
            "client": client,
            **more,
        }
        if message_endpoint is not None:
            body["message_endpoint"] = message_endpoint
        user: dict[str, Any] = self._transport.json(
            "POST", "users/", body=body, key=str(uuid.uuid4())
        )
        return user

    def me(self) -> dict[str, Any]:
        user: dict[str, Any] = self._transport.json("GET", "users/myself/")
        return user
