"""Downloads: checked, resumed, never half there."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fl_client
from fl_client import BrokenFile, Connection, NotFound
from tests.client.fake_server import Asked, FakeServer, Reply, deliver

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def fl(server: FakeServer) -> Iterator[Connection]:
    with fl_client.connect(server.url, token="key") as connection:
        yield connection


@pytest.fixture
def data(server: FakeServer) -> bytes:
    return server.add_model({"w": np.random.default_rng(0).normal(size=50_000)})


def test_weights_come_as_arrays(fl: Connection, server: FakeServer) -> None:
    weights = fl.models.weights("m")

    np.testing.assert_array_equal(weights["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert server.asked[0].headers["Accept"] == "application/vnd.safetensors"


def test_a_connection_that_breaks_is_resumed_where_it_broke(
    fl: Connection, server: FakeServer, data: bytes, tmp_path: Path
) -> None:
    digest = hashlib.sha256(data).hexdigest()
    server.faults["/api/models/m/"] = [Reply(200, data, {"ETag": f'"{digest}"'}, cut=100_000)]

    path = fl.models.download("m", tmp_path / "m.safetensors")

    assert path.read_bytes() == data
    assert server.asked[1].headers["Range"] == "bytes=100000-"
    assert server.asked[1].headers["If-Range"] == f'"{digest}"'
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_process_goes_on_with_what_an_earlier_one_left(
    fl: Connection, server: FakeServer, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.part").write_bytes(data[:1000])
    (tmp_path / "m.part.etag").write_text(hashlib.sha256(data).hexdigest())

    fl.models.download("m", tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == data
    assert server.asked[0].headers["Range"] == "bytes=1000-"


def test_a_model_that_changed_meanwhile_is_fetched_anew(
    fl: Connection, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.part").write_bytes(b"of another version")
    (tmp_path / "m.part.etag").write_text("0" * 64)

    fl.models.download("m", tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == data


def test_damaged_leftovers_are_thrown_away(fl: Connection, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(bytes(1000))
    (tmp_path / "m.part.etag").write_text(hashlib.sha256(data).hexdigest())

    fl.models.download("m", tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == data


def test_a_server_without_ranges_is_fine(
    fl: Connection, server: FakeServer, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.part").write_bytes(data[:1000])
    (tmp_path / "m.part.etag").write_text(hashlib.sha256(data).hexdigest())

    def whole(asked: Asked) -> Reply:
        return deliver(Asked(asked.method, asked.path, {}, {}, b""), data)

    server.routes["GET", "/api/models/m/"] = whole

    fl.models.download("m", tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == data


@pytest.mark.parametrize("headers", [{"ETag": f'"{"0" * 64}"'}, {}], ids=["wrong", "none"])
def test_bytes_without_the_right_digest_leave_no_file(
    fl: Connection, server: FakeServer, data: bytes, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.routes["GET", "/api/models/m/"] = lambda asked: Reply(200, data, headers)

    with pytest.raises(BrokenFile):
        fl.models.download("m", tmp_path / "m")

    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_not_found(fl: Connection, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        fl.models.download("nothing", tmp_path / "m")

    assert caught.value.code == "NOT_FOUND"
    assert caught.value.request_id == "r-1"
