from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from fl_server_core.models import ApiToken
from fl_server_core.services.tokens import BadToken, token_issue, token_revoke, token_user
from tests.scenes import person

pytestmark = pytest.mark.django_db


def test_a_token_opens_its_owners_door() -> None:
    ada = person("ada")

    key = token_issue(user=ada)

    assert token_user(key=key) == ada
    assert len(key) == 40


def test_what_is_stored_is_of_no_use_to_a_thief() -> None:
    key = token_issue(user=person("ada"))

    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM fl_server_core_apitoken")
        row = cursor.fetchone()

    assert key not in str(row)
    with pytest.raises(BadToken):
        token_user(key=ApiToken.objects.get().digest)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"revoked_at": timezone.now()}, "TOKEN_REVOKED"),
        ({"expires_at": timezone.now() - timedelta(seconds=1)}, "TOKEN_EXPIRED"),
        ({"digest": "0" * 64}, "BAD_TOKEN"),
    ],
)
def test_a_dead_token_says_why(change, code) -> None:
    key = token_issue(user=person("ada"))
    ApiToken.objects.update(**change)

    with pytest.raises(BadToken) as refusal:
        token_user(key=key)

    assert refusal.value.error_code == code


def test_an_inactive_user_has_no_working_token() -> None:
    key = token_issue(user=person("ada", is_active=False))

    with pytest.raises(BadToken):
        token_user(key=key)


def test_revoking_works_at_once_and_keeps_the_first_time() -> None:
    key = token_issue(user=person("ada"))
    token = ApiToken.objects.get()
    token_revoke(token=token)
    first = ApiToken.objects.get().revoked_at

    token_revoke(token=token)

    assert ApiToken.objects.get().revoked_at == first
    with pytest.raises(BadToken):
        token_user(key=key)


def test_tokens_survive_a_rotation_of_the_secret_key(settings) -> None:
    ada = person("ada")
    key = token_issue(user=ada)

    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
    settings.SECRET_KEY = "the new one"

    assert token_user(key=key) == ada


def test_the_last_use_is_written_at_most_once_a_minute(django_assert_num_queries) -> None:
    key = token_issue(user=person("ada"))
    token_user(key=key)

    with django_assert_num_queries(1):
        token_user(key=key)
