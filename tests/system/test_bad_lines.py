"""Large models over lines that break: nothing is sent twice that arrived once, and nothing is lost."""

import ctypes
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

import fl_client
from fl_client import transport
from fl_client.transport import Transport
from fl_client.upload import send_file
from tests.system.bad_line import BadLine
from tests.system.processes import Process, until
from tests.system.sites import checked, http, register
from tests.system.test_embedded import Embedded

pytestmark = pytest.mark.system
MB = 2**20
SIZES = [
    pytest.param(32 * MB, id="32 MB"),
    pytest.param(1024 * MB, id="1 GB", marks=[pytest.mark.heavy, pytest.mark.timeout(1200)]),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Embedded, Process]]:
    """A server for all tests that leave it running."""
    embedded = Embedded(tmp_path_factory.mktemp("shared"))
    with embedded.serving() as server:
        yield embedded, server


@pytest.fixture(scope="module")
def embedded(running: tuple[Embedded, Process]) -> Embedded:
    return running[0]


def large(path: Path, size: int) -> str:
    """A model of `size` bytes, which is never in this process's memory; its digest."""
    draw, digest = np.random.default_rng(3), hashlib.sha256()
    what = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(what, separators=(",", ":"))  # as the server itself writes it
    header += " " * (-len(header) % 8)
    with path.open("wb") as file:
        for number in range(-1, size // MB):
            head = len(header).to_bytes(8, "little") + header.encode()
            block = head if number < 0 else draw.standard_normal(MB // 4, np.float32).tobytes()
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


class Memory:
    """What a process takes at most beyond what it has now; `grown` in bytes."""

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        if pid == "self":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what others have left would hide what is to come
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it is now
        self._before = self._peak()

    @property
    def grown(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def killed_halfway(server: Process, line: BadLine, size: int, first: Memory) -> tuple[int, Memory]:
    """Kill the server when half of the file has gone over the line, and start it again.

    What it had grown by at the kill, and the memory of the next one.
    """
    until(lambda: line.up > size / 2, "half of the upload", 600)
    grown, said = first.grown, len(server.log)
    server.kill_all()
    server.start()
    until(lambda: "Serving at" in server.log[said:], "the server")
    return grown, Memory(server.pid)


@pytest.mark.parametrize("size", SIZES)
def test_an_update_over_a_line_that_breaks_arrives_with_few_extra_bytes(
    tmp_path: Path,
    size: int,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "SILENCE", 4.0 if size < 64 * MB else 30.0)
    digest = large(tmp_path / "update.safetensors", size)
    embedded = Embedded(tmp_path)
    with embedded.serving() as server:
        _, actor = register(embedded.base, "researcher", actor=True)
        site, token = register(embedded.base, "site", client=True)
        first = Memory(server.pid)
        with http(embedded.base, actor) as researcher:
            with (tmp_path / "update.safetensors").open("rb") as file:
                made = researcher.post(
                    "/api/models/", data={"name": "m", "description": "d"},
                    files={"model_file": file}, timeout=600,
                )  # fmt: skip
            model = checked(made, 201)["model_id"]
            wanted = {
                "model_id": model, "target_num_updates": 1, "aggregation_method": "FedAvg",
                "metric_names": [], "clients": [site], "options": {"skip_model_tests": True},
            }  # fmt: skip
            training = checked(researcher.post("/api/trainings/", json=wanted), 201)["training_id"]
            checked(researcher.post(f"/api/trainings/{training}/start/"), 202)
        line = BadLine(("127.0.0.1", embedded.port), rate=24 * MB, every=size // 6, silent=1)
        way = Transport(line.base, token=token)
        form = [("round", "0"), ("sample_size", "3")]
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(killed_halfway, server, line, size, first)
            client = Memory()
            sent = send_file(way, f"models/{model}/", form, tmp_path / "update.safetensors")
            grown = {"client": client.grown}
            grown["server"], restarted = killed.result()
            grown["server, restarted"] = restarted.grown
        way.close()
        line.close()
        record_property("extra bytes", f"{line.up - size} of {size}, {line.cuts} cuts")
        record_property("MB more", {who: round(one / MB, 1) for who, one in grown.items()})

        ((stored,),) = embedded.rows("select digest from fl_server_core_localmodel")
        assert (sent["received"], stored) == (1, digest)
        assert line.cuts >= 3
        assert line.up <= 1.05 * size, f"{line.up / size - 1:.1%} extra after {line.cuts} cuts"
        assert max(grown.values()) < min(size / 2, 64 * MB), grown
        until(lambda: _state(embedded, actor, training) == "C", "the end of the training")


def _state(embedded: Embedded, token: str, training: str) -> str:
    with http(embedded.base, token) as researcher:
        return str(checked(researcher.get(f"/api/trainings/{training}/"), 200)["state"])


@pytest.mark.parametrize("size", SIZES)
def test_a_download_over_a_line_that_breaks_goes_on_where_it_stopped(
    running: tuple[Embedded, Process],
    tmp_path: Path,
    size: int,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "SILENCE", 4.0 if size < 64 * MB else 30.0)
    embedded, process = running
    digest = large(tmp_path / "model.safetensors", size)
    _, token = register(embedded.base, f"downloads-{size}", actor=True)
    line = BadLine(("127.0.0.1", embedded.port), rate=24 * MB, every=size // 6, silent=1)
    with fl_client.connect(embedded.base, token=token) as fl:
        model = fl.models.upload(name="m", description="d", weights=tmp_path / "model.safetensors")

    server, client = Memory(process.pid), Memory()
    with fl_client.connect(line.base, token=token) as fl:
        arrived = fl.models.download(model, tmp_path / "arrived.safetensors")
    grown = {"client": client.grown, "server": server.grown}
    line.close()
    record_property("extra bytes", f"{line.down - size} of {size}, {line.cuts} cuts")
    record_property("MB more", {who: round(one / MB, 1) for who, one in grown.items()})

    with arrived.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    assert line.cuts >= 3
    assert line.down <= 1.05 * size
    assert max(grown.values()) < min(size / 2, 64 * MB), grown


def test_a_byte_that_is_flipped_on_the_way_is_refused_and_the_next_attempt_arrives(
    embedded: Embedded, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    digest = large(path, 20 * MB)
    _, token = register(embedded.base, "flips", actor=True)
    flips: list[int] = []

    class Flipping(Transport):
        """Damages the first transfer in its middle."""

        def headers(self, method, url, *, headers, content=None):  # type: ignore[no-untyped-def]
            if method == "PATCH" and not flips:
                content = self._damaged(content)
            return super().headers(method, url, headers=headers, content=content)

        def _damaged(self, content):  # type: ignore[no-untyped-def]
            for number, block in enumerate(content):
                if number == 9:
                    flips.append(number)
                    yield bytes([block[0] ^ 1]) + block[1:]
                else:
                    yield block

    flipping = Flipping(embedded.base, token=token)
    form = [("name", "m"), ("description", "d")]
    made = send_file(flipping, "models/", form, path, key="one")

    assert flips == [9]
    stored = flipping.json("GET", f"models/{made['model_id']}/metadata/")
    assert stored["sha256"] == digest
    flipping.close()


def test_the_note_of_an_unfinished_upload_outlives_the_client(
    embedded: Embedded, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    large(path, 20 * MB)
    _, token = register(embedded.base, "notes", actor=True)
    line = BadLine(("127.0.0.1", embedded.port), rate=64 * MB, every=8 * MB)
    form = [("name", "m"), ("description", "d")]
    impatient = Transport(line.base, token=token, attempts=1)
    with pytest.raises(fl_client.FLError):
        send_file(impatient, "models/", form, path, key="one")
    impatient.close()
    line.whole = True
    again = line.up

    patient = Transport(line.base, token=token)
    made = send_file(patient, "models/", form, path, key="one")
    patient.close()
    line.close()

    assert made["model_id"]
    assert line.up - again < 17 * MB
    assert not path.with_name(path.name + ".upload").exists()
    assert httpx.get(f"{embedded.base}/livez").status_code == 200
