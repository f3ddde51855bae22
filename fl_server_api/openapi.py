"""What drf-spectacular can't see by itself: the twin under /api/v1/, and lists that may come in pages."""

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
