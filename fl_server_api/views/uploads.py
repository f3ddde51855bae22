"""Resumable uploads: the tus 1.0.0 protocol with creation, checksum, expiration and termination."""

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.utils.http import http_date
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.exceptions import APIException
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_api.auth import caller
from fl_server_api.idempotency import once
from fl_server_api.serializers.uploads import UploadOutput
from fl_server_api.throttling import PIECES, UPLOADS
from fl_server_api.views.base import View, answers
from fl_server_core.exceptions import Invalid, NotFound, UnknownContainer
from fl_server_core.models import Upload
from fl_server_core.selectors import get_visible, uploads_visible_to
from fl_server_core.services.uploads import (
    upload_append,
    upload_create,
    upload_delete,
    upload_offset,
)

VERSION = "1.0.0"
MEDIA_TYPE = "application/offset+octet-stream"
ALGORITHMS = ("sha1", "sha256")
EXTENSIONS = "creation,checksum,expiration,termination"
BLOCK = 2**16  # what a broken line costs at most; the front gives larger ones whole or not at all
NUMBER = re.compile(r"\d{1,18}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class OtherVersion(APIException):
    """The client speaks another version of tus, or has forgotten to say so."""

    status_code = 412
    default_code = "TUS_VERSION"


def _header(name: str, about: str, *, pattern: str = "", required: bool = True) -> OpenApiParameter:
    kind: dict[str, Any] = {"type": "string", **({"pattern": f"^{pattern}$"} if pattern else {})}
    return OpenApiParameter(
        name, kind, OpenApiParameter.HEADER, required=required, description=about
    )


TUS = OpenApiParameter("Tus-Resumable", str, OpenApiParameter.HEADER, required=True, enum=[VERSION])


class TusView(View):
    """What both routes share: the version on every answer, and on every question."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        method = str(request.method)
        if method in {"HEAD", "POST", "PATCH", "DELETE"} and hasattr(self, method.lower()):
            said = request.headers.get("Tus-Resumable", "")
            if said != VERSION:
                raise OtherVersion(f"send the header Tus-Resumable: {VERSION}")

    def finalize_response(self, request: Request, response: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().finalize_response(request, response, *args, **kwargs)
        answer["Tus-Resumable"] = answer["Tus-Version"] = VERSION
        return answer

    @extend_schema(exclude=True)
    def options(self, request: Any, *args: Any, **kwargs: Any) -> Response:
        """What tus clients ask first."""
        headers = {
            "Tus-Extension": EXTENSIONS,
            "Tus-Max-Size": str(settings.FL_MAX_MODEL_BYTES),
            "Tus-Checksum-Algorithm": ",".join(ALGORITHMS),
        }
        return Response(status=204, headers=headers)


class UploadsView(TusView):
    """Announcing a file."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="uploads_list",
        responses=answers({200: UploadOutput(many=True)}),
    )
    def get(self, request: Request) -> Response:
        """Your uploads that are still here."""
        return Response(UploadOutput(uploads_visible_to(caller(request)), many=True).data)

    @extend_schema(
        operation_id="uploads_create",
        request=None,
        parameters=[
            TUS,
            _header("Upload-Length", "Bytes of the whole file.", pattern="[1-9][0-9]{0,9}"),
            _header(
                "Upload-Metadata",
                "`sha256 <base64 of the hexadecimal digest>`: checked when the file is complete.",
                required=False,
            ),
        ],
        responses=answers({201: UploadOutput}, 400, 404, 409, 412, 507),
    )
    def post(self, request: Request) -> Response:
        """Announce a file; then send its bytes with PATCH to `Location`.

        With the same `Idempotency-Key` it is announced once; 404 (UPLOAD_GONE) when that one was deleted.
        """
        user, metadata = caller(request), request.headers.get("Upload-Metadata", "")
        length, sha256 = _number(request, "Upload-Length"), _sha256(metadata)

        def act() -> dict[str, str]:
            made = upload_create(owner=user, length=length, sha256=sha256, metadata=metadata)
            return {"id": str(made.pk)}

        asked = {"length": length, "metadata": metadata}
        made = once(request, act, asked=asked)["id"]
        upload = uploads_visible_to(user).filter(pk=made).first()
        if upload is None:
            raise NotFound(
                "the upload of this Idempotency-Key is gone; announce the file with a new key",
                code="UPLOAD_GONE",
            )
        headers = {"Location": f"/api/uploads/{upload.pk}/", **_expiry(upload)}
        return Response(UploadOutput(upload).data, status=201, headers=headers)


class UploadView(TusView):
    """One file on its way."""

    rates = {"PATCH": PIECES}

    @extend_schema(operation_id="uploads_retrieve", responses=answers({200: UploadOutput}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """How far it is, for people."""
        return Response(UploadOutput(self._upload(request, pk)).data)

    @extend_schema(exclude=True)
    def head(self, request: Request, pk: str) -> Response:
        """Where to go on. Whoever sends bytes of it at this moment is stopped."""
        upload = self._upload(request, pk)
        headers = {
            "Upload-Offset": str(upload_offset(upload)),
            "Upload-Length": str(upload.length),
            "Cache-Control": "no-store",
            **_expiry(upload),
        }
        if upload.metadata:
            headers["Upload-Metadata"] = upload.metadata
        return Response(status=200, headers=headers)

    @extend_schema(
        operation_id="uploads_append",
        request={MEDIA_TYPE: OpenApiTypes.BINARY},
        parameters=[
            TUS,
            _header("Upload-Offset", "How many bytes are there already.", pattern="[0-9]{1,18}"),
            _header("Upload-Checksum", "`sha256 <base64>` of this piece.", required=False),
        ],
        responses=answers({204: None}, 400, 404, 409, 412, 415, 422, 460, 507),
    )
    def patch(self, request: Request, pk: str) -> Response:
        """Send bytes from `Upload-Offset` on. Those that arrived before the line broke are kept."""
        upload = self._upload(request, pk)
        if request.content_type.partition(";")[0].strip() != MEDIA_TYPE:
            raise UnknownContainer(f"send the bytes as {MEDIA_TYPE}", code="UNSUPPORTED_MEDIA_TYPE")
        offset, checksum = _number(request, "Upload-Offset"), _checksum(request)
        reached = upload_append(upload, offset=offset, blocks=_body(request), checksum=checksum)
        return Response(status=204, headers={"Upload-Offset": str(reached), **_expiry(upload)})

    @extend_schema(
        operation_id="uploads_destroy",
        parameters=[TUS],
        responses=answers({204: None}, 404, 412),
    )
    def delete(self, request: Request, pk: str) -> Response:
        """Give it up; its bytes are deleted."""
        upload_delete(self._upload(request, pk))
        return Response(status=204)

    def _upload(self, request: Request, pk: str) -> Upload:
        return get_visible(uploads_visible_to(caller(request)), pk)


def _expiry(upload: Upload) -> dict[str, str]:
    return {"Upload-Expires": http_date(upload.expires_at.timestamp())}


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not NUMBER.fullmatch(text):
        raise Invalid(f"the header {name} is missing or no number", code="BAD_HEADER")
    return int(text)


def _sha256(metadata: str) -> str:
    """The announced digest in `Upload-Metadata`, if it is there."""
    if len(metadata) > 4000 or not metadata.isascii() or "\x00" in metadata:
        raise Invalid("Upload-Metadata is at most 4000 characters of ASCII", code="BAD_HEADER")
    for pair in metadata.split(","):
        name, _, value = pair.strip().partition(" ")
        if name == "sha256":
            digest = _unpacked(value, "Upload-Metadata").decode("latin-1").lower()
            if not DIGEST.fullmatch(digest):
                raise Invalid("sha256 is 64 hexadecimal digits, in base64", code="BAD_HEADER")
            return digest
    return ""


def _checksum(request: Request) -> tuple[str, bytes] | None:
    given = request.headers.get("Upload-Checksum")
    if given is None:
        return None
    algorithm, _, value = given.strip().partition(" ")
    if algorithm not in ALGORITHMS:
        raise Invalid(
            f"Upload-Checksum is one of {', '.join(ALGORITHMS)}, a space, and base64",
            code="BAD_CHECKSUM",
        )
    digest = _unpacked(value, "Upload-Checksum")
    if len(digest) != hashlib.new(algorithm, usedforsecurity=False).digest_size:
        raise Invalid(f"this is no {algorithm} digest", code="BAD_CHECKSUM")
    return algorithm, digest


def _unpacked(text: str, header: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # of base64, or of letters that are none of ASCII
        raise Invalid(f"{header} holds no valid base64", code="BAD_HEADER") from error


def _body(request: Request) -> Iterator[bytes]:
    """The body in blocks, as they come; `Invalid` (BODY_INTERRUPTED) if it ends too early."""
    left = int(request.META.get("CONTENT_LENGTH") or 0)
    while left > 0:
        block = request._request.read(min(left, BLOCK))
        if not block:
            raise Invalid("the body ended too early; go on later", code="BODY_INTERRUPTED")
        left -= len(block)
        yield block
