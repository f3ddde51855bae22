"""The API keeps to its own OpenAPI document, whatever is thrown at it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fl_server.wsgi import application
from fl_server_core.services.tokens import token_issue
from fl_server_core.services.uploads import upload_create
from tests.scenes import person, scene

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(params=["admin", "participant", "actor"])
def documented(request, settings, monkeypatch):
    """The document, and the token of somebody in the middle of a training."""
    settings.FL_POLL_SECONDS = 0
    monkeypatch.setattr("fl_server_api.views.results.STREAM_SECONDS", 0)
    settings.ALLOWED_HOSTS = ["*"]
    running = scene()
    running.send("ada", 1.0)
    user = {
        "admin": lambda: person("root", is_superuser=True, is_staff=True, actor=True, client=True),
        "participant": lambda: running.sites["grace"],
        "actor": lambda: running.actor,
    }[request.param]()
    known = {"models": running.training.model_id, "trainings": running.training.pk}
    known |= {"tasks": running.task("grace").pk, "users": user.pk}
    known["uploads"] = upload_create(owner=user, length=100).pk
    schema = schemathesis.openapi.from_wsgi("/api/schema/?format=json", application)
    return schema, token_issue(user=user), known


def attack(operation, token: str, real_id: object) -> None:
    """Send generated cases, with made-up ids and with one that exists."""

    @settings(
        max_examples=4,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def cases(case) -> None:
        ids = [None, real_id] if real_id and "id" in case.path_parameters else [None]
        for known in ids:
            if known is not None:
                case.path_parameters["id"] = str(known)
            answer = case.call(headers={"Authorization": f"Token {token}"})
            case.validate_response(answer, checks=CHECKS)

    cases()


def test_every_operation_answers_as_documented(documented, subtests) -> None:
    schema, token, known = documented
    operations = [result.ok() for result in schema.get_all_operations()]

    for operation in operations:
        with subtests.test(operation.label):
            attack(operation, token, known.get(operation.path.split("/")[2]))

    assert len(operations) > 40
