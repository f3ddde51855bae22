"""Multipart bodies that are put together wrongly, and packed ones."""

import gzip
import zlib
from typing import Any

from tests.api.malformed.case import HONEST, Send, Stage, case

KIND = "multipart/form-data; boundary=B"


def part(name: str | bytes, value: bytes, *headers: bytes, filename: str | None = None) -> bytes:
    """One part, as a browser writes it."""
    raw = name.encode() if isinstance(name, str) else name
    told = b'Content-Disposition: form-data; name="%b"' % raw
    if filename is not None:
        told += b'; filename="%b"' % filename.encode()
    return b"--B\r\n" + b"\r\n".join([told, *headers]) + b"\r\n\r\n" + value + b"\r\n"


ROUND, SIZE = part("round", b"0"), part("sample_size", b"2")
FILE = part("model_file", HONEST, filename="w")
END = b"--B--\r\n"
WHOLE = ROUND + SIZE + FILE + END


def raw(data: bytes, kind: str = KIND, **headers: str) -> Send:
    """These bytes to the model."""

    def send(stage: Stage, to: str) -> Any:
        return stage.client().generic("POST", stage.path(to), data, content_type=kind, **headers)

    return send


def packed(data: bytes, coding: str = "gzip", kind: str = KIND) -> Send:
    return raw(data, kind, HTTP_CONTENT_ENCODING=coding)


def json_body(text: str) -> Send:
    return raw(text.encode(), "application/json")


PARTS = [
    case("no body", 400, "INVALID", "/round|required", raw(b"")),
    case("no boundary", 400, "INVALID", "boundary", raw(WHOLE, "multipart/form-data")),
    case("a boundary of three hundred characters", 415, "UNSUPPORTED_MEDIA_TYPE", "boundary",
         raw(WHOLE, "multipart/form-data; boundary=" + "B" * 300)),
    case("another boundary", 400, "INVALID", "/round|required", raw(WHOLE, KIND[:-1] + "C")),
    case("only the first boundary", 400, "INVALID", "/round|required", raw(b"--B\r\n")),
    case("a body cut within the form", 400, "INVALID", "/sample_size", raw(WHOLE[: len(ROUND) + 5])),
    case("a body cut within the file", 400, "BODY_INTERRUPTED", "model_file|send it again", raw((ROUND + SIZE + FILE)[:-60])),
    case("a file under the name of a number", 400, "INVALID", "/round|required",
         raw(part("round", b"0", filename="r") + SIZE + FILE + END)),
    case("a part without a name", 400, "INVALID", "/round|required",
         raw(b"--B\r\nContent-Type: text/plain\r\n\r\n0\r\n" + SIZE + FILE + END)),
    case("a field in capitals", 400, "UNKNOWN_FIELD", "ROUND", raw(part("ROUND", b"0") + SIZE + FILE + END)),
    case("a field with a NUL", 400, "UNKNOWN_FIELD", "did you mean round",
         raw(part("round\0", b"0") + SIZE + FILE + END)),
    case("a round that is no UTF-8", 400, "INVALID", "/round|integer",
         raw(part("round", b"\xff\xfe") + SIZE + FILE + END)),
    case("a round in base64 that is none", 400, "INVALID", "/round|integer",
         raw(part("round", b"!", b"Content-Transfer-Encoding: base64") + SIZE + FILE + END)),
    case("a file in base64 that is none", 400, "INVALID", "base64",
         raw(ROUND + SIZE + part("model_file", b"!!!!!", b"Content-Transfer-Encoding: base64", filename="w") + END)),
    case("two files, one of another name", 400, "INVALID", "2 times",
         raw(ROUND + SIZE + FILE + part("model_file", b"x", filename="v") + END)),
    case("six thousand fields", 400, "TOO_MANY_FIELDS", "fields|5,000",
         raw(b"".join(part(f"f{i}", b"") for i in range(6000)) + END)),
    case("two hundred files", 400, "TOO_MANY_FIELDS", "files",
         raw(b"".join(part(f"f{i}", b"", filename="w") for i in range(200)) + END)),
    case("a field of five megabytes", 413, "TOO_LARGE", "4,194,304", raw(part("note", b"x" * 5 * 2**20) + ROUND + END)),
    case("a file above the limit, announced", 413, "TOO_LARGE", "10|announced",
         raw(ROUND + SIZE + part("model_file", bytes(2**21), filename="w") + END), FL_MAX_MODEL_BYTES=10),
    case("a file above the limit, not announced", 413, "TOO_LARGE", "100",
         raw(WHOLE), FL_MAX_MODEL_BYTES=100),
    case("text", 415, "UNSUPPORTED_MEDIA_TYPE", "text/plain", raw(WHOLE, "text/plain")),
    case("the file alone", 415, "UNSUPPORTED_MEDIA_TYPE", "octet-stream", raw(HONEST, "application/octet-stream")),
    case("no content type", 415, "UNSUPPORTED_MEDIA_TYPE", "", raw(WHOLE, "")),
    case("an urlencoded form", 400, "FIELD_REQUIRED", "multipart|uploads/",
         raw(b"round=0&sample_size=2", "application/x-www-form-urlencoded")),
    case("JSON without a file", 400, "FIELD_REQUIRED", "multipart", json_body('{"round": 0, "sample_size": 2}')),
    case("JSON with a file in it", 400, "INVALID", "/model_file",
         json_body('{"round": 0, "sample_size": 2, "model_file": "AAAA"}')),
    case("JSON with half a round", 400, "INVALID", "/round", json_body('{"round": 0.5, "sample_size": 2}')),
    case("JSON with NaN", 400, "INVALID", "NaN", json_body('{"round": NaN, "sample_size": 2}')),
    case("JSON with a round of four hundred digits", 400, "INVALID", "/round",
         json_body('{"round": 1' + "0" * 400 + ', "sample_size": 2}')),
    case("JSON that is a list", 400, "INVALID", "dictionary", json_body("[]")),
    case("JSON nested without end", 400, "INVALID", "JSON", json_body("[" * 100_000)),
]  # fmt: skip

PACKED = [
    case("gzip that unpacks to too much", 413, "COMPRESSION_RATIO", "unpacks",
         packed(gzip.compress(ROUND + b"".join(part(f"f{i}", bytes(900_000), filename="w") for i in range(4)) + END)),
         FL_MAX_MODEL_BYTES=2**20),
    case("gzip of a file above the limit", 413, "TOO_LARGE", "1,048,576",
         packed(gzip.compress(ROUND + part("model_file", bytes(2**22), filename="w") + END)),
         FL_MAX_MODEL_BYTES=2**20),
    case("gzip that is cut off", 400, "BAD_CONTENT_ENCODING", "cut off", packed(gzip.compress(WHOLE)[:-9])),
    case("gzip with something behind it", 400, "BAD_CONTENT_ENCODING", "follows", packed(gzip.compress(WHOLE) + b"x")),
    case("gzip with a wrong checksum", 400, "BAD_CONTENT_ENCODING", "gzip",
         packed(gzip.compress(WHOLE)[:-8] + bytes(8))),
    case("gzip that is none", 400, "BAD_CONTENT_ENCODING", "no gzip", packed(WHOLE)),
    case("deflate under gzip's name", 400, "BAD_CONTENT_ENCODING", "no gzip", packed(zlib.compress(WHOLE))),
    case("a coding that is not spoken", 415, "UNKNOWN_CONTENT_ENCODING", "gzip", packed(WHOLE, "br")),
    case("gzip twice", 415, "UNKNOWN_CONTENT_ENCODING", "gzip", packed(WHOLE, "gzip, gzip")),
    case("packed JSON", 415, "UNKNOWN_CONTENT_ENCODING", "multipart",
         packed(gzip.compress(b'{"round": 0}'), kind="application/json")),
]  # fmt: skip

CASES = [*PARTS, *PACKED]
