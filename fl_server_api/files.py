"""Where a request's file is: in its body, or in a resumable upload that it names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rest_framework.request import Request

from fl_server_api.auth import caller
from fl_server_api.idempotency import known
from fl_server_api.uploads import StagedFile, announced
from fl_server_core.exceptions import Invalid
from fl_server_core.models import Upload
from fl_server_core.selectors import get_visible, uploads_visible_to
from fl_server_core.services.quotas import storage_check
from fl_server_core.services.uploads import Taken, upload_taken, upload_used


def refuse_over_quota(request: Request) -> None:
    """Raise `Conflict` (STORAGE_QUOTA) for a body that the caller has no room for, before it is read.

    What is asked again is answered as before. Whether it is the same is known once it is read: until then another body
    is in staging, as that of an update that will be refused is.
    """
    if not known(request):
        storage_check(user=caller(request), size=announced(request))


def staged_of(body: Mapping[str, Any], name: str) -> StagedFile:
    """The file part `name`; `Invalid` (FIELD_REQUIRED) without it."""
    file = body.get(name)
    if not isinstance(file, StagedFile):
        raise Invalid(
            f"{name} is missing; send it as a file of a multipart form, or upload it at uploads/ and "
            "send its id as `upload`",
            code="FIELD_REQUIRED",
            errors=[{"pointer": f"/{name}", "code": "required", "detail": "this file is required"}],
        )
    return file


def size_of(body: Mapping[str, Any], *names: str) -> int:
    """Bytes of those of these file parts that are there."""
    return sum(staged_of(body, name).size or 0 for name in names if body.get(name) is not None)


def upload_of(request: Request, body: Mapping[str, Any]) -> Upload | None:
    """The caller's upload that the body names; `NotFound` for others, `Invalid` beside a file."""
    named = body.get("upload")
    if not named:
        return None
    if body.get("model_file") is not None:
        raise Invalid(
            "send model_file or upload, not both",
            errors=[{"pointer": "/upload", "code": "contradiction", "detail": "one of the two"}],
        )
    return get_visible(uploads_visible_to(caller(request)).select_related("update__round"), named)


@contextmanager
def model_file(request: Request, body: Mapping[str, Any]) -> Iterator[StagedFile | Taken]:
    """The model's file, whichever way it came; an upload is used up if nothing is raised."""
    upload = upload_of(request, body)
    if upload is None:
        yield staged_of(body, "model_file")
        return
    with upload_taken(upload) as taken:
        yield taken
    upload_used(upload)
