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


FEW = 2  # cases an operation, and sequences; more are nightly, with the edges of every parameter
# What valid data may come to beside success: a piece that is too long, a body that is too large.
ACCEPTED = ["2xx", "3xx", "401", "403", "404", "409", "413", "429", "503", "507"]
# A body has rules that the document can't tell: files that are weights, names that are free, options of a strategy.
RULES = ["400", "415", "422", "460"]
REFUSED = ["400", "401", "403", "404", "405", "409", "412", "413", "415", "422", "429", "460"]


def config(token: str, examples: int, *, coverage: bool, ruled: list[str]) -> SchemathesisConfig:
    """All checks. `ruled` are the ids of operations with a body, or with headers as tus has them."""
    generation = {"max-examples": examples, "deterministic": True, "database": "none"}
    return SchemathesisConfig.from_dict(
        {
            "seed": 7,
            "workers": 1,
            "headers": {"Authorization": f"Token {token}"},
            "generation": generation,
            "phases": {
                "examples": {"enabled": False},
                "coverage": {"enabled": coverage},
                "stateful": {"max-steps": 6, "generation": generation},
            },
            "checks": {
                "positive_data_acceptance": {"expected-statuses": ACCEPTED},
                "negative_data_rejection": {"expected-statuses": REFUSED},
                "missing_required_header": {"expected-statuses": REFUSED},
            },
            "operations": [
                {
                    "include-operation-id": ruled,
                    "checks": {
                        "positive_data_acceptance": {"expected-statuses": [*ACCEPTED, *RULES]}
                    },
                }
            ],
        }
    )


def with_rules_of_their_own(raw: dict[str, Any]) -> list[str]:
    operations = (one for path in raw["paths"].values() for one in path.values())
    return [
        one["operationId"]
        for one in operations
        if "requestBody" in one or one["operationId"].startswith("uploads_")
    ]


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


@pytest.mark.parametrize(
    ("who", "examples"),
    [
        ("actor", FEW),
        *(
            pytest.param(who, 50, marks=pytest.mark.heavy)
            for who in ("admin", "participant", "actor")
        ),
    ],
)
def test_every_operation_keeps_to_the_document(
    settings: Any, monkeypatch: pytest.MonkeyPatch, who: str, examples: int
) -> None:
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
    address = "/api/schema/?format=json"
    ruled = with_rules_of_their_own(schemathesis.openapi.from_wsgi(address, application).raw_schema)
    wanted = config(token, examples, coverage=examples > FEW, ruled=ruled)
    schema = schemathesis.openapi.from_wsgi(address, application, config=wanted)

    found = failures(from_schema(schema).execute())

    connections.close_all()
    assert not found, "\n\n".join(found)
