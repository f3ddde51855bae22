"""The API keeps to its own OpenAPI document, whatever is thrown at it, alone and in sequences."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import requests
import schemathesis
from django.db import connections
from drf_spectacular.generators import SchemaGenerator
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.engine import Status, events, from_schema
from schemathesis.transport.wsgi import WSGITransport

from fl_server.wsgi import application
from fl_server_core.services.tokens import token_issue
from fl_server_core.services.uploads import upload_create
from tests.scenes import person, scene

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A failure's request is printed whole, and bodies are long.
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),
]
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")

FEW = 2  # cases an operation, and sequences; nightly there are more
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


def with_rules_of_their_own(document: dict[str, Any]) -> list[str]:
    operations = (one for path in document["paths"].values() for one in path.values())
    return [
        one["operationId"]
        for one in operations
        if "requestBody" in one or one["operationId"].startswith("uploads_")
    ]


def with_known_ids(document: dict[str, Any], known: dict[str, Any]) -> None:
    """What there is becomes the example of each id in a path: it's asked for beside ids that are made up."""
    for path, operations in document["paths"].items():
        real = known.get(path.split("/")[2])
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if real is not None and (parameter["in"], parameter["name"]) == ("path", "id"):
                    parameter["example"] = real


def is_form(case: schemathesis.Case) -> bool:
    """There, one value and a list of one are the same bytes, as are a number and its digits: no data are wrong for that."""
    return str(case.media_type).startswith(("multipart/", "application/x-www-form-urlencoded"))


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
                        if isinstance(failure, AcceptedNegativeData) and is_form(case):
                            continue
                        answer = event.recorder.find_response(case_id=case_id)
                        said.append(
                            f"{event.phase} {case.operation.label}: {failure.title}: {failure.message}\n"
                            f"{node.failure_info.code_sample}\n{answer and answer.content[:300]!r}"
                        )
    return said


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session for what is asked again without a token, and bodies that stay in memory.

    Only with a session does the transport leave out what an application in the same process has no use for; and large bodies
    are files that its test client doesn't close.
    """
    monkeypatch.setattr("werkzeug.test.TemporaryFile", lambda _: BytesIO())
    send = WSGITransport.send

    def with_session(self: Any, case: Any, *, session: Any = None, **kwargs: Any) -> Any:
        return send(self, case, session=session or requests.Session(), **kwargs)

    monkeypatch.setattr(WSGITransport, "send", with_session)


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
@pytest.mark.usefixtures("in_process")
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
    known = {"models": running.training.model_id, "trainings": running.training.pk}
    known |= {"tasks": running.task("grace").pk, "users": running.sites["ada"].pk}
    known["uploads"] = upload_create(owner=user, length=100).pk
    document = SchemaGenerator().get_schema(public=True)
    with_known_ids(document, {name: str(pk) for name, pk in known.items()})
    ruled = with_rules_of_their_own(document)
    wanted = config(token_issue(user=user), examples, coverage=examples > FEW, ruled=ruled)
    schema = schemathesis.openapi.from_dict(document, config=wanted)
    schema.app, schema.location = application, "/api/schema/"

    found = failures(from_schema(schema).execute())

    connections.close_all()
    assert not found, "\n\n".join(found)
