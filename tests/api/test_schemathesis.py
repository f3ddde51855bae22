"""The API keeps to its own OpenAPI document, whatever is thrown at it, alone and in sequences."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from django.db import connections
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from fl_server.wsgi import application
from fl_server_core.services.tokens import token_issue
from tests.scenes import person, scene

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


def config(examples: int, token: str) -> SchemathesisConfig:
    generation = {"max-examples": examples, "deterministic": True, "database": "none"}
    return SchemathesisConfig.from_dict(
        {
            "seed": 7,
            "workers": 1,
            "headers": {"Authorization": f"Token {token}"},
            "generation": generation,
            "phases": {"stateful": {"max-steps": 6, "generation": {"max-examples": examples}}},
        }
    )


def failures(found: Iterator[events.EngineEvent]) -> list[str]:
    said = []
    for event in found:
        if isinstance(event, events.NonFatalError | events.FatalError):
            said.append(str(getattr(event, "info", event)))
        if isinstance(event, events.ScenarioFinished) and event.status == Status.FAILURE:
            for case_id, checks in event.recorder.checks.items():
                for node in checks:
                    if node.failure_info is not None:
                        case = event.recorder.cases[case_id].value
                        failure = node.failure_info.failure
                        answer = event.recorder.find_response(case_id=case_id)
                        body = answer.content[:300] if answer else b""
                        said.append(
                            f"{event.phase} {case.operation.label}: {failure.title}: {failure.message} "
                            f"| {node.failure_info.code_sample} | {body!r}"
                        )
    return said


@pytest.mark.parametrize("who", ["admin", "participant", "actor"])
def test_every_operation_keeps_to_the_document(settings: Any, monkeypatch: Any, who: str) -> None:
    settings.FL_POLL_SECONDS = 0
    monkeypatch.setattr("fl_server_api.views.results.STREAM_SECONDS", 0)
    settings.ALLOWED_HOSTS = ["*"]
    running = scene()
    running.send("ada", 1.0)
    user = {
        "admin": lambda: person("root", is_superuser=True, is_staff=True, actor=True, client=True),
        "participant": lambda: running.sites["grace"],
        "actor": lambda: running.actor,
    }[who]()
    token = token_issue(user=user)
    schema = schemathesis.openapi.from_wsgi(
        "/api/schema/?format=json", application, config=config(3, token)
    )

    found = failures(from_schema(schema).execute())

    connections.close_all()
    assert not found, "\n\n".join(found)
