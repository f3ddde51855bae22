"""Forms with files are packed where the server reads that and it helps; error feedback of the encodings."""

import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest
from fake_server import Reply

from fl_client import Context, encodings, packing
from fl_client.transport import Transport

ZEROS = bytes(2**16)
NOISE = np.random.default_rng(0).bytes(2**16)


@pytest.fixture
def offering(server):
    """A server that says what it reads with every answer, and keeps what it gets."""
    got = []

    def take(asked) -> Reply:
        got.append(asked)
        return Reply(200, {}, {"Accept-Encoding": server.offer})

    server.routes["GET", "/api/here/"] = lambda _: Reply(200, {}, {"Accept-Encoding": server.offer})
    server.routes["POST", "/api/here/"] = take
    server.offer = "gzip"
    server.got = got
    return server


def send(server, tmp_path: Path, data: bytes, pack: bool = True):
    path = tmp_path / "file"
    path.write_bytes(data)
    transport = Transport(server.url, token="t", pack=pack)
    transport.json("GET", "here/")
    transport.json("POST", "here/", form=[("round", "0")], files={"model_file": path}, key="k")
    transport.close()
    return server.got[-1]


def test_a_body_that_shrinks_travels_packed_and_the_same_each_time(offering, tmp_path) -> None:
    first, again = send(offering, tmp_path, ZEROS), send(offering, tmp_path, ZEROS)

    assert first.headers["Content-Encoding"] == "gzip"
    assert int(first.headers["Content-Length"]) == len(first.body) < 2**12
    assert first.body == again.body
    first.body = gzip.decompress(first.body)
    assert (first.files["model_file"], first.form["round"]) == (ZEROS, ["0"])
    assert first.headers["Authorization"] == "Token t"


@pytest.mark.parametrize(
    ("offer", "data", "pack"),
    [("gzip", NOISE, True), ("", ZEROS, True), ("br", ZEROS, True), ("gzip", ZEROS, False)],
    ids=["noise", "an old server", "other codings", "not asked for"],
)
def test_otherwise_it_travels_as_it_is(offering, tmp_path, offer, data, pack) -> None:
    offering.offer = offer

    asked = send(offering, tmp_path, data, pack)

    assert "Content-Encoding" not in asked.headers
    assert asked.files["model_file"] == data


@pytest.mark.skipif(not packing._zstd(), reason="zstd is not installed here")
def test_zstd_comes_first(offering, tmp_path) -> None:
    offering.offer = "gzip, zstd"

    asked = send(offering, tmp_path, ZEROS)

    assert asked.headers["Content-Encoding"] == "zstd"
    asked.body = importlib.import_module(packing._zstd()).decompress(asked.body)
    assert asked.files["model_file"] == ZEROS


def test_without_zstd_gzip_will_do(monkeypatch) -> None:
    monkeypatch.setattr(packing, "_zstd", lambda: "")

    assert packing.packer("zstd, gzip;q=0.5")[0] == "gzip"
    assert packing.packer("zstd") is None


@pytest.mark.parametrize(
    "encode",
    [
        encodings.fp16,
        encodings.int8,
        lambda change: encodings.qsgd(change, 40, np.random.default_rng(5)),
    ],
    ids=["fp16", "int8", "qsgd"],
)
def test_with_feedback_what_is_lost_in_one_round_comes_in_the_next(tmp_path, encode) -> None:
    change = np.random.default_rng(1).standard_normal(200).astype(np.float32) * 0.3
    total, plain = np.zeros(200), np.zeros(200)
    for number in range(20):
        context = Context({"round": number}, lambda _: {}, folder=tmp_path)
        delta = encodings.Encoded({"w": change, "n": np.array(1)}, {"kind": "delta"})

        coded = encodings.feedback(delta, encode, context)

        total += encodings._decoded(coded, "w", np.dtype("f8"))
        plain += encodings._decoded(encode(delta), "w", np.dtype("f8"))
        assert coded.weights["n"] == 1
    lost = np.abs(total - 20 * change.astype(np.float64)).max()
    once = np.abs(encodings._decoded(coded, "w", np.dtype("f8")) - change).max()
    assert lost <= 2 * once + 1e-4  # of one round, not of twenty
    assert lost < np.abs(plain - 20 * change).max()


def test_qsgd_whose_errors_would_grow_is_refused(tmp_path) -> None:
    delta = encodings.Encoded({"w": np.ones(200, np.float32)}, {"kind": "delta"})
    context = Context({"round": 0}, lambda _: {}, folder=tmp_path)

    with pytest.raises(ValueError, match="more than 14 levels"):
        encodings.feedback(
            delta, lambda change: encodings.qsgd(change, 14, np.random.default_rng(5)), context
        )


def test_a_round_that_is_made_twice_begins_with_the_same_rest(tmp_path) -> None:
    delta = encodings.Encoded({"w": np.array([0.3, 1.0], np.float32)}, {"kind": "delta"})
    first = Context({"round": 0}, lambda _: {}, folder=tmp_path)
    encodings.feedback(delta, encodings.int8, first)

    made = [
        encodings.feedback(
            delta, encodings.int8, Context({"round": 1}, lambda _: {}, folder=tmp_path)
        )
        for _ in range(2)
    ]

    assert made[0].weights["w"].tobytes() == made[1].weights["w"].tobytes()
