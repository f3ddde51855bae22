"""SWAG rounds, and daisy chains that a site refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

import fl_client
from fl_client import Context, SwagCollector, SwagResult
from tests.client.conftest import Site
from tests.client.fake_server import Asked, FakeServer, Reply

pytestmark = pytest.mark.enable_socket


def run(site: fl_client.Client, server: FakeServer, folder: Path) -> Any:
    return fl_client.run(site, url=server.url, token="key", workdir=folder)


def accepting(server: FakeServer, url: str) -> list[Asked]:
    """Take what is posted there, once for each task; the list of what has come."""
    sent: list[Asked] = []

    def take(asked: Asked) -> Reply:
        sent.append(asked)
        server.tasks.pop(0)
        return Reply(201, {"detail": "ok"})

    server.routes["POST", url] = take
    return sent


def test_moments_are_sent_as_two_files(server: FakeServer, tmp_path: Path) -> None:
    class Swag(Site):
        def swag(
            self, weights: dict[str, Any], config: dict[str, Any], context: Context
        ) -> SwagResult:
            collector = SwagCollector()
            for step in range(3):
                collector.add({name: array + step for name, array in weights.items()})
            return collector.result(num_examples=7)

    server.add_task("swag", round=1, upload_url="/api/models/m/swag/")
    sent = accepting(server, "/api/models/m/swag/")
    run(Swag(), server, tmp_path)

    assert sent[0].form == {"round": ["1"], "sample_size": ["7"]}
    first = load(sent[0].files["first_moment_file"])
    second = load(sent[0].files["second_moment_file"])
    start = np.arange(6, dtype=np.float64).reshape(2, 3)
    steps = np.stack([start + step for step in range(3)])
    np.testing.assert_allclose(first["w"], steps.mean(0), rtol=1e-15)
    np.testing.assert_allclose(second["w"], (steps**2).mean(0), rtol=1e-15)
    assert not list(tmp_path.rglob("*.second"))


def test_deviations_are_a_third_file_where_the_server_takes_them(
    server: FakeServer, tmp_path: Path
) -> None:
    class Swag(Site):
        def swag(
            self, weights: dict[str, Any], config: dict[str, Any], context: Context
        ) -> SwagResult:
            collector = SwagCollector(rank=config.get("swag_rank", 0))
            for step in range(4):
                collector.add({name: array * step for name, array in weights.items()})
            return collector.result(num_examples=7)

    server.add_task("swag", round=1, upload_url="/api/models/m/swag/", config={"swag_rank": 3})
    sent = accepting(server, "/api/models/m/swag/")
    run(Swag(), server, tmp_path)

    found = load(sent[0].files["deviations_file"])["w"]
    start = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([start * (step - 1.5) for step in (1, 2, 3)]))
    assert not list(tmp_path.rglob("*.deviations"))


def test_a_client_without_a_swag_method_says_so(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task("swag", round=1, upload_url="/api/models/m/swag/")

    run(site, server, tmp_path)

    assert server.failures[0]["code"] == "SWAG_NOT_IMPLEMENTED"


def test_a_site_may_refuse_to_hand_its_model_to_others(server: FakeServer, tmp_path: Path) -> None:
    class Private(Site):
        share_raw_model = False

    server.add_task(config={"daisy_chain": True})
    private = Private()

    run(private, server, tmp_path)

    assert server.failures[0]["code"] == "CHAINING_REFUSED"
    assert private.fits == 0


def test_a_collector_counts_floats_only_and_needs_a_step() -> None:
    torch = pytest.importorskip("torch")
    collector = SwagCollector()
    with pytest.raises(ValueError, match="at least once"):
        collector.result(1)

    collector.add({"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)})
    collector.add({"w": torch.full((2,), 3.0), "n": torch.tensor(4)})

    found = collector.result(5)
    assert set(found.first) == {"w"}
    np.testing.assert_array_equal(found.first["w"], [2.0, 2.0])
    np.testing.assert_array_equal(found.second["w"], [5.0, 5.0])


def test_initial_weights_are_sent_to_their_own_task(server: FakeServer, tmp_path: Path) -> None:
    class Beginner(Site):
        def initial_weights(self, config: dict[str, Any], context: Context) -> dict[str, Any]:
            return {"w": np.full(3, 2.5, np.float32)}

    server.add_task("initial_weights", round=0, upload_url="/api/tasks/t/result/")
    sent = accepting(server, "/api/tasks/t/result/")
    run(Beginner(), server, tmp_path)

    assert sent[0].form == {"meta": ['{"num_examples": 1}']}
    assert load(sent[0].files["model_file"])["w"].tolist() == [2.5] * 3


def test_a_client_without_initial_weights_says_so(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    server.add_task("initial_weights", round=0, upload_url="/api/tasks/t/result/")

    run(site, server, tmp_path)

    assert server.failures[0]["code"] == "INITIAL_WEIGHTS_NOT_IMPLEMENTED"


def test_a_client_that_has_something_to_say_joins_before_it_works(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Told(Site):
        attributes = {"gpu": True}
        num_examples = 400

    said = []

    def join(asked: Any) -> Reply:
        said.append(asked.json)
        lack = {"training": "t", "text": "gpu: 'A100' is required, it says True"}
        return Reply(200, {"client": "c", "missing": [lack], "min_protocol": 1})

    server.routes["POST", "/api/clients/me/join/"] = join
    with caplog.at_level("WARNING", logger="fl.client"):
        run(Told(), server, tmp_path)

    assert said[0]["attributes"] == {"gpu": True}
    assert said[0]["num_examples"] == 400
    assert "train" in said[0]["capabilities"]
    assert "cannot ask this site: gpu" in caplog.text
