"""Accounts for `waiting.py`, past the password hash that registration takes half a second for.

Run with the server's environment; writes a JSON object to standard output.
"""

import json
import sys

import django

django.setup()

from fl_server_core.models import User  # noqa: E402 - needs the settings
from fl_server_core.services.tokens import token_issue  # noqa: E402


def account(name: str, **kind: bool) -> dict[str, str]:
    """A user who can log in with the token only."""
    user = User(username=name, **kind)
    user.set_unusable_password()
    user.save()
    return {"id": str(user.pk), "token": token_issue(user=user)}


def main() -> None:
    sites = [account(f"site-{n:04}", client=True) for n in range(int(sys.argv[1]))]
    print(json.dumps({"actor": account("researcher", actor=True), "sites": sites}))


if __name__ == "__main__":
    main()
