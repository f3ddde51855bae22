"""Registration: only the fields named here are ever taken from a request."""

from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from fl_server_core.exceptions import Invalid
from fl_server_core.models import User


def user_prepare(
    *,
    username: str,
    password: str,
    email: str = "",
    first_name: str = "",
    last_name: str = "",
    actor: bool = False,
    client: bool = False,
    message_endpoint: str = "",
) -> User:
    """A plain user, not stored yet; `Invalid` names the field that is wrong.

    Hashing the password takes most of a second, which no transaction should last.
    """
    user = User(
        username=username,
        email=email,
        first_name=first_name,
        last_name=last_name,
        actor=actor,
        client=client,
        message_endpoint=message_endpoint,
    )
    try:
        validate_password(password, user)
    except ValidationError as error:
        raise Invalid(
            "this password is too weak",
            errors=[{"pointer": "/password", "code": "weak", "detail": m} for m in error.messages],
        ) from error
    user.set_password(password)
    return user


def user_register(user: User) -> User:
    """Store a prepared user; `Invalid` if the name is taken."""
    try:
        with transaction.atomic():
            user.save(force_insert=True)
    except IntegrityError as error:
        raise Invalid(
            f"the user name {user.username!r} is taken",
            code="USERNAME_TAKEN",
            errors=[{"pointer": "/username", "code": "unique", "detail": "this name is taken"}],
        ) from error
    return user
