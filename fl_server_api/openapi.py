"""What drf-spectacular can't see by itself: the twin under /api/v1/, lists in pages, and what an id is for."""

from typing import Any

LINK = {"type": "string", "format": "uri", "nullable": True}


def without_v1(endpoints: list[Any]) -> list[Any]:
    """Before: `/api/v1/` is the same as `/api/` and named once."""
    return [entry for entry in endpoints if not entry[0].startswith("/api/v1/")]


def with_pages(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """After: where `page_size` may be given, the answer is an array or a page of one."""
    for path in result["paths"].values():
        names = {p["name"] for p in path.get("get", {}).get("parameters", [])}
        if "page_size" in names:
            content = path["get"]["responses"]["200"]["content"]["application/json"]
            content["schema"] = {"oneOf": [content["schema"], _page(content["schema"])]}
    return result


def _page(array: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "count": {"type": "integer"},
            "next": LINK,
            "previous": LINK,
            "results": array,
        },
        "required": ["count", "next", "previous", "results"],
    }


def with_bodies_of_delete(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """After: `DELETE trainings/<id>/clients/` has a body, which is the one of PUT."""
    clients = result["paths"]["/api/trainings/{id}/clients/"]
    clients["delete"]["requestBody"] = clients["put"]["requestBody"]
    return result


# What an answer names, and where its id belongs: (operation, status, where the id is, path without its first part).
MADE = (
    ("groups_create", "201", "/id", "groups/{id}/"),
    ("users_register", "201", "/id", "users/{id}/"),
    ("tokens_create", "201", "/id", "users/myself/tokens/{id}/"),
    ("models_create", "201", "/model_id", "models/{id}/"),
    ("trainings_create", "201", "/training_id", "trainings/{id}/"),
    ("uploads_create", "201", "/id", "uploads/{id}/"),
    ("tasks_next", "200", "/task/id", "tasks/{id}/"),
    ("inference", "202", "/job_id", "inference/{id}/"),
    ("calibration", "202", "/job_id", "calibrations/{id}/"),
)


def with_links(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """After: each answer that makes something names the operations that its id is for."""
    operations = {
        operation["operationId"]: (path, operation)
        for path, methods in result["paths"].items()
        for operation in methods.values()
    }
    for made, status, pointer, below in MADE:
        links = operations[made][1]["responses"][status].setdefault("links", {})
        for name, (path, _) in operations.items():
            if path.startswith(f"/api/{below}"):
                parameters = {"id": f"$response.body#{pointer}"}
                links[name] = {"operationId": name, "parameters": parameters}
    return result
