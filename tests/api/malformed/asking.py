"""Who sends, for which round and version, and the fields of the form."""

import json
import uuid
from typing import Any

from tests.api.malformed.case import HONEST, Send, Stage, case, file, form, meta

DIGEST = "0" * 64


def header(text: str) -> Send:
    """An honest form with this Authorization header."""

    def send(stage: Stage, to: str) -> Any:
        body = {"round": 0, "sample_size": 2, "model_file": file(HONEST)}
        path = stage.path(to)
        return stage.client("").post(path, body, format="multipart", HTTP_AUTHORIZATION=text)

    return send


def path(address: str, who: str = "ada") -> Send:
    """An honest form to another address."""

    def send(stage: Stage, to: str) -> Any:
        body = {"round": 0, "sample_size": 2, "model_file": file(HONEST)}
        found = address.format(update=uuid.UUID(int=1), spare=stage.scene(to).model.pk)
        return stage.client(who).post(found, body, format="multipart")

    return send


def foreign_task(stage: Stage, to: str) -> Any:
    body = {"meta": json.dumps({"num_examples": 2}), "model_file": file(HONEST)}
    return stage.client("grace").post(stage.result(to), body, format="multipart")


def uploaded(who: str = "ada", cut: int = 0, **more: Any) -> Send:
    """An upload by `who`, `cut` bytes short, named in an honest form of ada's."""

    def send(stage: Stage, to: str) -> Any:
        named = stage.upload(HONEST, cut=cut, who=who)
        return form(model_file=None, upload=named, **more)(stage, to)

    return send


WHO = [
    case("nobody", 401, "NOT_AUTHENTICATED", "Authorization: Token", form(who="")),
    case("an unknown token", 401, "BAD_TOKEN", "log in again", header("Token " + "0" * 40)),
    case("a token in two words", 401, "BAD_TOKEN", "Authorization", header("Token a b")),
    case("a Bearer token", 401, "BAD_TOKEN", "Authorization: Token <key>", header("Bearer abc")),
    case("a password that is no base64", 401, "BAD_CREDENTIALS", "Basic", header("Basic !!!")),
    case("an outsider", 404, "NOT_FOUND", "", form(who="eve"), to="outsiders"),
    case("a participant who was taken out", 404, "NOT_FOUND", "", form(who="gone"), to="joined"),
    case("the actor, who has no data", 403, "NOT_PARTICIPANT", "take part|actor", form(who="actor")),
    case("another site's task", 404, "NOT_FOUND", "", foreign_task),
    case("a model that is not there", 404, "NOT_FOUND", "", path("/api/models/{update}/")),
    case("a model's id that is a word", 404, "NOT_FOUND", "", path("/api/models/tiny/")),
    case("a model without a training", 404, "NO_TRAINING", "training", path("/api/models/{spare}/", "actor"),
         to="spare"),
    case("a task's id that is none", 404, "NOT_FOUND", "", path("/api/tasks/{update}/result/")),
]  # fmt: skip

ROUND = [
    case("no round", 400, "INVALID", "/round|required", form(round=None)),
    case("an empty round", 400, "INVALID", "/round|integer", form(round="")),
    case("a round that is a word", 400, "INVALID", "/round|integer", form(round="abc")),
    case("half a round", 400, "INVALID", "/round|integer", form(round="0.5")),
    case("a round in exponents", 400, "INVALID", "/round|integer", form(round="1e0")),
    case("a round that is NaN", 400, "INVALID", "/round|integer", form(round="nan")),
    case("a round with a NUL", 400, "INVALID", "/round", form(round="0\0")),
    case("a negative round", 400, "INVALID", "/round|greater", form(round=-1)),
    case("a huge round", 400, "INVALID", "/round|less", form(round=10**30)),
    case("a round of five thousand digits", 400, "INVALID", "/round", form(round="9" * 5000)),
    case("two rounds", 400, "INVALID", "/round|2 times", form(round=["0", "1"])),
    case("a round to come", 409, "ROUND_CLOSED", "round 1|at round 0", form(round=1)),
    case("a round to come, with a bad file", 409, "ROUND_CLOSED", "round 1",
         form(round=1, model_file=b"x")),
    case("before the start", 409, "TRAINING_NOT_RUNNING", "takes no updates", form(), to="not started"),
    case("for who joined later", 409, "NOT_SELECTED", "next one", form(who="late"), to="joined"),
    case("after giving up", 409, "TASK_CLOSED", "BROKEN", form(), meta(), to="failed"),
    case("other bytes after the first", 409, "DUPLICATE", "round 0", form(), meta(), to="sent"),
    case("the same bytes with other samples", 409, "DUPLICATE", "round 0", form(sample_size=9), to="sent"),
    case("another version", 409, "BASE_VERSION", "version 1|version 0", form(base_version=1),
         meta(base_version=1)),
    case("another version, with a bad file", 409, "BASE_VERSION", "version 1",
         form(base_version=1, model_file=b"x")),
    case("a negative version", 400, "INVALID", "base_version", form(base_version=-1), meta(base_version=-1)),
    case("a version that is a word", 400, "INVALID", "base_version", form(base_version="x"),
         meta(base_version="x")),
]  # fmt: skip

FIELDS = [
    case("no samples", 422, "SAMPLE_SIZE", "sample_size is 0|2147483648", form(sample_size=0),
         meta(num_examples=0)),
    case("minus one sample", 422, "SAMPLE_SIZE", "is -1", form(sample_size=-1), meta(num_examples=-1)),
    case("more samples than are counted", 422, "SAMPLE_SIZE", "2147483649", form(sample_size=2**31 + 1),
         meta(num_examples=2**31 + 1)),
    case("samples beyond 64 bits", 400, "INVALID", "/sample_size", form(sample_size=10**30)),
    case("half a sample", 400, "INVALID", "/sample_size", form(sample_size="1.5")),
    case("samples that are NaN", 400, "INVALID", "/sample_size", form(sample_size="NaN")),
    case("no sample size", 400, "INVALID", "/sample_size|required", form(sample_size=None)),
    case("two sample sizes", 400, "INVALID", "/sample_size|2 times", form(sample_size=[1, 2])),
    case("minus one step", 400, "INVALID", "num_steps", form(num_steps=-1), meta(num_steps=-1)),
    case("a digest that is none", 400, "INVALID", "sha256|64 hexadecimal", form(sha256="abc"), meta(sha256="abc")),
    case("another digest", 422, "DIGEST_MISMATCH", f"{DIGEST}|send it again", form(sha256=DIGEST),
         meta(sha256=DIGEST), uploaded(sha256=DIGEST)),
    case("another digest of a bad file", 422, "DIGEST_MISMATCH", DIGEST,
         form(sha256=DIGEST, model_file=b"x")),
    case("Round for round", 400, "UNKNOWN_FIELD", "did you mean round", form(round=None, Round=0)),
    case("modelfile for model_file", 400, "UNKNOWN_FIELD", "did you mean model_file",
         form(model_file=None, modelfile=HONEST)),
    case("metric_name for metric_names", 400, "UNKNOWN_FIELD", "did you mean metric_names",
         form(metric_name="loss", metric_values="1")),
    case("no file", 400, "FIELD_REQUIRED", "model_file is missing|uploads/", form(model_file=None)),
    case("a file that is text", 400, "INVALID", "/model_file", form(model_file="hello")),
    case("a file and an upload", 400, "INVALID", "not both", form(upload=DIGEST)),
    case("two files", 400, "INVALID", "/model_file|2 times", form(model_file=[HONEST, HONEST])),
    case("an upload that is not there", 404, "NOT_FOUND", "", form(model_file=None, upload=str(uuid.UUID(int=2)))),
    case("an upload with a NUL", 400, "INVALID", "/upload", form(model_file=None, upload="a\0b")),
    case("another site's upload", 404, "NOT_FOUND", "", uploaded("grace")),
    case("an upload that is cut", 409, "UPLOAD_INCOMPLETE", "send the rest|offset", uploaded(cut=9)),
]  # fmt: skip

METRICS = [
    case("a metric without a value", 400, "METRIC_MISMATCH", "1 metric_names|0 metric_values",
         form(metric_names=["a"])),
    case("a value without a metric", 400, "METRIC_MISMATCH", "0 metric_names", form(metric_values=["1"])),
    case("a metric twice", 400, "METRIC_MISMATCH", "'a'|twice",
         form(metric_names=["a", "a"], metric_values=["1", "2"])),
    case("a metric that is NaN", 400, "METRIC_NON_FINITE", "'a'", form(metric_names=["a"], metric_values=["nan"])),
    case("a metric of 1e999", 400, "METRIC_NON_FINITE", "'a'",
         form(metric_names=["a"], metric_values=["1e999"])),
    case("a metric with a comma", 400, "METRIC_NUMBER", "0,85|decimal point",
         form(metric_names=["a"], metric_values=["0,85"])),
    case("a metric of too many bytes", 400, "METRIC_SIZE", "'a'|1048576",
         form(metric_names=["a"], metric_values=["x" * (2**20 + 1)])),
    case("a metric with a long name", 400, "METRIC_NAME", "128",
         form(metric_names=["a" * 129], metric_values=["1"])),
    case("a metric with a NUL", 400, "INVALID", "/metric_names", form(metric_names=["a\0"], metric_values=["1"])),
    case("a metric without a name", 400, "METRIC_NAME", "1 to 128", form(metric_names=[""], metric_values=["1"])),
    case("a thousand and one metrics", 400, "TOO_MANY_METRICS", "1,001|1,000",
         form(metric_names=list(map(str, range(1001))), metric_values=["1"] * 1001)),
]  # fmt: skip

META = [
    case("meta that is no JSON", 400, "BAD_META", "JSON", meta("{")),
    case("an empty meta", 400, "INVALID", "/meta", meta("")),
    case("meta that is a list", 400, "INVALID", "dictionary", meta("[]")),
    case("meta that is a number", 400, "INVALID", "dictionary", meta("7")),
    case("NaN in meta", 400, "BAD_META", "NaN", meta('{"num_examples": NaN}')),
    case("1e999 in meta", 400, "BAD_META", "JSON", meta('{"num_examples": 1, "metrics": {"a": 1e999}}')),
    case("a NUL in meta", 400, "BAD_META", "NUL", meta('{"num_examples": 1, "metrics": {"\\u0000": 1}}')),
    case("half a surrogate in meta", 400, "BAD_META", "", meta('{"num_examples": 1, "x": "\\ud800"}')),
    case("meta nested without end", 400, "BAD_META", "JSON", meta("[" * 100_000)),
    case("meta of a million characters", 400, "INVALID", "/meta|1000000", meta(" " * 10 + "x" * 1_000_001)),
    case("meta without examples", 400, "INVALID", "/num_examples|required", meta("{}")),
    case("half an example in meta", 400, "INVALID", "/num_examples", meta(num_examples=1.5)),
    case("examples beyond 64 bits in meta", 400, "INVALID", "/num_examples", meta(num_examples=10**400)),
    case("a misspelt key in meta", 400, "UNKNOWN_FIELD", "did you mean num_examples",
         meta('{"num_example": 2}')),
    case("metrics in meta that are a list", 400, "INVALID", "/metrics", meta(metrics=[1])),
    case("a metric in meta that is a list", 400, "INVALID", "/metrics/a", meta(metrics={"a": [1]})),
    case("a metric in meta that says NaN", 400, "INVALID", "/metrics/a", meta(metrics={"a": "nan"})),
    case("a metric in meta with a long name", 400, "METRIC_NAME", "128", meta(metrics={"a" * 129: 1})),
]  # fmt: skip

CASES = [*WHO, *ROUND, *FIELDS, *METRICS, *META]
