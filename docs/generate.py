"""Writes the reference pages that are made from code: `python docs/generate.py FOLDER`."""
# ruff: noqa: TID251 - a process of its own, whose environment it sets

import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_server_core.registry import Registry

ROOT = Path(__file__).resolve().parent.parent


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(value: object) -> str:
    text = str(value)
    if not text.startswith("`"):
        text = text.replace("<", "&lt;")
    return " ".join(text.replace("|", "\\|").split())


def code(value: object) -> str:
    return f"`{value}`" if str(value) else ""


# --- settings ---------------------------------------------------------------------------------


def settings_page() -> str:
    """Every variable that the settings modules read, with its default."""
    from fl_server.settings import env

    needed: set[str] = set()

    def note(name: str, about: str) -> str:
        env.SETTINGS.setdefault(name, env.Setting(name, None, about))
        needed.add(name)
        return "only for this page"

    env.required = note
    for name in ("base", "embedded", "production"):
        importlib.import_module(f"fl_server.settings.{name}")
    folder = str(Path(os.environ["FL_DATA_DIR"]).resolve())
    rows = []
    for setting in sorted(env.SETTINGS.values(), key=lambda s: s.name):
        default = setting.default
        if setting.name == "FL_DATA_DIR":
            default = "./data"
        shown = code((default or "").replace(folder, "$FL_DATA_DIR"))
        if setting.name in needed:
            shown = f"{shown} (production: required)".strip()
        rows.append((code(setting.name), shown, setting.about))
    return table(("variable", "default", "what it is for"), rows)


# --- strategies and options -------------------------------------------------------------------


def options_table(schema: dict[str, Any]) -> str:
    """The properties of an options dataclass's JSON schema."""
    from fl_server_ai.aggregation.options import limits_text

    rows = []
    for name, entry in schema["properties"].items():
        kind = entry["type"] if isinstance(entry["type"], str) else " or ".join(entry["type"])
        default = json.dumps(entry["default"]) if "default" in entry else "required"
        rows.append(
            (
                code(name),
                ", ".join([kind, *limits_text(entry)]),
                code(default),
                entry.get("description", ""),
            )
        )
    return table(("option", "type", "default", "meaning"), rows) if rows else "No options.\n"


def strategies_page() -> str:
    """Every registered aggregation strategy."""
    from fl_server_ai.aggregation import STRATEGIES
    from fl_server_ai.services.training_options import strategy_schema

    return registered_page(STRATEGIES, strategy_schema)


def uncertainty_page() -> str:
    """Every registered uncertainty method."""
    from fl_server_ai.uncertainty import UNCERTAINTY
    from fl_server_ai.uncertainty.options import schema

    return registered_page(UNCERTAINTY, lambda name: schema(UNCERTAINTY[name].Options))


def registered_page(registry: "Registry[Any]", schema: Callable[[str], Any]) -> str:
    """A section for each class: what its module and it say, and its options."""
    parts = []
    for name in registry:
        kind = registry[name]
        module = sys.modules[kind.__module__]
        parts.append(
            f"## {name}\n\n{inspect.getdoc(module)}\n\n{inspect.getdoc(kind)}\n\n{paper(kind)}"
            f"{options_table(schema(name))}"
        )
    return "\n".join(parts)


def paper(kind: type[Any]) -> str:
    """A line with the link to the paper that a strategy follows."""
    given = getattr(kind, "paper", "")
    url = given if given.startswith("https://") else f"https://arxiv.org/abs/{given}"
    return f"Paper: <{url}>\n\n" if given else ""


def preprocessing_page() -> str:
    """Every step of a pipeline."""
    from fl_server_ai.aggregation.options import schema
    from fl_server_ai.preprocessing.steps import STEPS

    parts = [
        f"## {name}\n\n{inspect.getdoc(kind)}\n\n{options_table(schema(kind))}"
        for name, kind in STEPS.items()
    ]
    return "\n".join(parts)


def trainer_options_page() -> str:
    """Options of the trainer itself."""
    from fl_server_ai.aggregation.options import schema
    from fl_server_ai.services.training_options import TrainerOptions

    return options_table(schema(TrainerOptions))


# --- errors -----------------------------------------------------------------------------------


SHOWN = 3  # texts of one code


def errors_page() -> str:
    """Every code of a refusal, with what it says; then those that stand in reasons."""
    sys.path.insert(0, str(ROOT / "docs"))
    from error_codes import reasons, refusals

    from fl_server.front.refusals import REFUSALS

    first = table(
        ("code", "status", "what it says"),
        [(code(entry.code), entry.status, _texts(entry.says)) for entry in refusals()],
    )
    second = table(
        ("code", "what it says"),
        [(code(entry.code), _texts(entry.says)) for entry in reasons()],
    )
    third = table(
        ("code", "status", "what it says"),
        [(code(name), status, said) for name, (status, said) in REFUSALS.items()],
    )
    first = f"{first}\nBefore anybody is asked, the front says:\n\n{third}"
    return f"## Refusals\n\n{first}\n## Codes in reasons\n\n{REASONS}\n\n{second}"


REASONS = (
    "These come with no refusal. They stand at the start of a `reason` or `failure`: why a round was skipped or has failed, why a part of it ended "
    "without an update, why a message was not delivered, why a training stopped. Sites add codes of their own with `POST tasks/<id>/failure/`, and a refusal that "
    "comes up while updates are aggregated is named there by its code from the table above."
)


def _texts(says: Iterable[str]) -> str:
    """The first few, with dots for what is filled in."""
    shown = [re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "…", text) for text in says]
    return " / ".join(shown[:SHOWN]) + (" / …" if len(shown) > SHOWN else "")


# --- HTTP API ---------------------------------------------------------------------------------


KINDS = {
    "application/json": "JSON",
    "application/x-www-form-urlencoded": "form",
    "multipart/form-data": "multipart",
}


def http_page(schema: dict[str, Any]) -> str:
    """Every operation of the OpenAPI document, with what goes in and what comes out."""
    parts: dict[str, list[str]] = {}
    for path, operations in schema["paths"].items():
        group = path.removeprefix("/api/").split("/")[0]
        for method, operation in operations.items():
            parts.setdefault(group, []).append(_operation(schema, method, path, operation))
    return "\n".join(f"## {group}\n\n" + "\n".join(found) for group, found in parts.items())


def _operation(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    text = f"### {method.upper()} {path}\n\n{operation.get('description', '')}\n\n"
    rows = [
        (code(p["name"]), p["in"], _type(p["schema"]), p.get("description", ""))
        for p in operation.get("parameters", [])
    ]
    sent: dict[tuple[str, str, str], list[str]] = {}
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        for name, field, optional, about in _fields(schema, content["schema"]):
            row = (code(name) + ("" if optional else " \\*"), _type(field), about)
            sent.setdefault(row, []).append(KINDS.get(kind, kind))
    rows += [(name, ", ".join(kinds), kind, about) for (name, kind, about), kinds in sent.items()]
    if rows:
        text += table(("field", "in", "type", ""), rows) + "\n"
    answers: dict[str, list[str]] = {}
    for status, answer in operation["responses"].items():
        names = {_type(content["schema"]) for content in answer.get("content", {}).values()}
        answers.setdefault(" or ".join(sorted(names)) or "no body", []).append(status)
    said = "; ".join(f"{', '.join(statuses)} {name}" for name, statuses in answers.items())
    return f"{text}Answers: {said}.\n"


def _fields(
    schema: dict[str, Any], body: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], bool, str]]:
    if "$ref" in body:
        body = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    for name, field in body.get("properties", {}).items():
        yield name, field, name not in body.get("required", []), field.get("description", "")


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return code(field["$ref"].rsplit("/", 1)[1])
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    for key in ("allOf", "oneOf", "anyOf"):
        if key in field:
            return " or ".join(_type(part) for part in field[key])
    kind = field.get("type", "any")
    kind = kind if isinstance(kind, str) else " or ".join(kind)
    return f"{kind} ({field['format']})" if "format" in field else str(kind)


def bodies_page(schema: dict[str, Any]) -> str:
    """Every named body of the OpenAPI document."""
    parts = []
    for name, body in sorted(schema["components"]["schemas"].items()):
        if "properties" not in body:
            said = ", ".join(code(value) for value in body.get("enum", []))
            parts.append(f"### {name}\n\n{said}\n")
            continue
        rows = [
            (code(field), _type(entry), about) for field, entry, _, about in _fields(schema, body)
        ]
        parts.append(f"### {name}\n\n" + table(("field", "type", ""), rows))
    return "## Bodies\n\n" + "\n".join(parts)


def openapi() -> dict[str, Any]:
    """The document that the server gives at /api/schema/."""
    import django

    django.setup()
    from drf_spectacular.generators import SchemaGenerator

    generator: Any = SchemaGenerator
    return dict(generator().get_schema(request=None, public=True))


# --- states -----------------------------------------------------------------------------------


def state_pictures() -> dict[str, str]:
    """One SVG for each table of moves that people ask about."""
    sys.path.insert(0, str(ROOT / "docs"))
    from states import PICTURES, drawn

    from fl_server_core.lifecycle import MOVES

    return {
        f"states-{kind.__name__}.svg": drawn(kind, moves)
        for kind, moves in MOVES.items()
        if kind.__name__ in PICTURES
    }


def main(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    data = tempfile.mkdtemp(prefix="fl-docs-")
    for name in [name for name in os.environ if name.startswith("FL_")]:
        del os.environ[name]  # the page shows defaults, not whoever builds it
    os.environ.update(DJANGO_SETTINGS_MODULE="fl_server.settings.embedded", FL_DATA_DIR=data)
    os.environ["FL_S3_BUCKET"] = "any"  # or what else S3 needs would not be read
    try:
        schema = openapi()
        pages = {
            "http-api.md": http_page(schema) + "\n" + bodies_page(schema),
            "strategies.md": strategies_page(),
            "trainer-options.md": trainer_options_page(),
            "uncertainty.md": uncertainty_page(),
            "preprocessing.md": preprocessing_page(),
            "errors.md": errors_page(),
            "settings.md": settings_page(),
            **state_pictures(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
