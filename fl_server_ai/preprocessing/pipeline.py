"""A pipeline: checked, in one canonical form, and back from it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fl_server_ai.aggregation.options import parse_options, schema
from fl_server_ai.preprocessing.steps import NAMES, STEPS, Flatten, Step
from fl_server_core.exceptions import Invalid

MOST_STEPS = 64
LARGEST_TEXT = 2**18  # bytes
EXAMPLE = '{"steps": [{"step": "resize", "size": [224, 224]}, {"step": "cast", "dtype": "float32", "scale": true}]}'

Pipeline = tuple[Step, ...]


def parse_text(text: bytes) -> Pipeline:
    """The pipeline in a JSON text; `Invalid` (BAD_PREPROCESSING) with a pointer to each fault."""
    if len(text) > LARGEST_TEXT:
        raise _refused([("", "length", f"more than {LARGEST_TEXT:,} bytes")])
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused([("", "json", f"this is no valid JSON: {str(error)[:200]}")]) from error
    return parse(document)


def parse(document: Any) -> Pipeline:
    """The pipeline of `{"steps": [...]}`. Every fault is named, not only the first."""
    if not isinstance(document, dict) or not isinstance(document.get("steps"), list):
        raise _refused([("/steps", "required", f"a pipeline is an object such as {EXAMPLE}")])
    faults = [
        (f"/{_key(name)}", "unknown", "a pipeline has steps only")
        for name in document
        if name != "steps"
    ]
    given = document["steps"]
    if len(given) > MOST_STEPS:
        faults.append(("/steps", "length", f"{len(given)} steps; {MOST_STEPS} are allowed"))
        given = []
    steps: list[Step] = []
    for index, entry in enumerate(given):
        try:
            step = _step(entry, f"/steps/{index}")
        except Invalid as refusal:
            faults += [(e["pointer"], e["code"], e["detail"]) for e in refusal.data["errors"]]
            continue
        faults += [(f"/steps/{index}/{at}", code, said) for at, code, said in step.faults()]
        if isinstance(step, Flatten) and index + 1 < len(given):
            faults.append((f"/steps/{index}", "order", "flatten must be the last step"))
        steps.append(step)
    if faults:
        raise _refused(faults)
    return tuple(steps)


def document_of(pipeline: Sequence[Step]) -> dict[str, Any]:
    """What `parse` takes, with all defaults filled in."""
    return {"steps": [{"step": NAMES[type(step)], **asdict(step)} for step in pipeline]}


def canonical_text(pipeline: Sequence[Step]) -> bytes:
    """The one text for a pipeline: its steps' names first, then their options in order of their names."""
    steps = [
        {"step": entry.pop("step"), **dict(sorted(entry.items()))}
        for entry in document_of(pipeline)["steps"]
    ]
    return json.dumps({"steps": steps}, separators=(",", ":"), allow_nan=False).encode()


def pipeline_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a pipeline."""
    steps = []
    for name, kind in STEPS.items():
        found = schema(kind)
        properties = {"step": {"const": name}, **found["properties"]}
        required = ["step", *found.get("required", [])]
        steps.append({**found, "properties": properties, "required": required})
    return {
        "type": "object",
        "properties": {
            "steps": {"type": "array", "maxItems": MOST_STEPS, "items": {"oneOf": steps}}
        },
        "required": ["steps"],
        "additionalProperties": False,
    }


def _step(entry: Any, pointer: str) -> Step:
    if not isinstance(entry, dict) or type(entry.get("step")) is not str:
        raise _refused([(f"{pointer}/step", "required", "a step is an object with the key step")])
    name = entry["step"]
    if name not in STEPS:
        known = ", ".join(STEPS)
        raise _refused(
            [(f"{pointer}/step", "unknown", f"no step {name[:64]!r}; there are {known}")]
        )
    rest = {key: value for key, value in entry.items() if key != "step"}
    step: Step = parse_options(STEPS[name], rest, pointer=pointer, beside=("step",))
    return step


def _refused(faults: Sequence[tuple[str, str, str]]) -> Invalid:
    errors = [{"pointer": at, "code": code, "detail": said} for at, code, said in faults[:100]]
    told = "; ".join(f"{at or '/'}: {said}" for at, _, said in faults[:5])
    return Invalid(f"bad preprocessing: {told}"[:2000], code="BAD_PREPROCESSING", errors=errors)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _key(name: str) -> str:
    return name[:64].replace("~", "~0").replace("/", "~1")
