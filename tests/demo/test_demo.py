"""What `make demo` promises, with its real processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import fl_client
from demo.__main__ import broken_promise
from demo.corruption import corrupted
from demo.data import deal, load
from demo.processes import DemoFailed, Federation, fresh

ROOT = Path(__file__).resolve().parents[2]
WORKING: dict[str, Any] = {
    "rounds": 2,
    "accuracies": [0.9, 0.95],
    "accuracy": 0.95,
    "updates_per_round": [5, 5],
    "best_alone": 0.7,
    "rankings": {"NONE": {"auroc": 0.8}},
    "sites": [{}] * 5,
}


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    return subprocess.run(
        [sys.executable, "-m", "demo", "--folder", str(folder), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def processes_of(folder: Path) -> list[str]:
    """Processes whose environment or output files name this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            opened = [file.path for file in process.open_files()]
            if any(str(folder) in path for path in [*opened, *process.environ().values()]):
                found.append(process.name())
        except psutil.Error:
            continue
    return found


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Federation]:
    """A server on the data that a demo has left in `tmp_path/demo`."""
    with Federation(tmp_path / "demo") as federation:
        yield federation


@pytest.mark.system
@pytest.mark.timeout(900)
def test_the_demo_trains_better_than_any_site_alone_and_can_be_run_again(
    tmp_path: Path, kept: Federation
) -> None:
    folder, result_file = tmp_path / "demo", tmp_path / "result.json"

    done = demo(folder, "--json", str(result_file))

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("accuracy ") >= 10  # a line a round: this is no terminal
    result = json.loads(result_file.read_text())
    assert result["updates_per_round"] == [5] * 10
    assert result["accuracy"] >= 0.93
    assert result["accuracy"] > max(site["alone"] for site in result["sites"])
    assert [site["mode"] for site in result["sites"]].count("webhook") == 2
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["rankings"]) == 4
    assert min(ranking["auroc"] for ranking in result["rankings"].values()) >= 0.7
    assert "AUROC" in (folder / "coverage.svg").read_text()
    assert processes_of(folder) == []
    data = re.search(r"FL_DATA_DIR=(\S+) make serve", done.stdout)
    password = re.search(r"user admin, password (\S+)", done.stdout)
    assert data
    assert password
    assert Path(data[1]) == folder / "data"

    kept.serve("another password, which is not used")
    with fl_client.connect(kept.url, username="admin", password=password[1]) as fl:
        training = fl.trainings.get(result["training"])
        assert training.get()["state"] == "C"
        means = [r for r in training.metrics() if r["identifier"] == "aggregated"]
        assert [row["value_float"] for row in means] == result["accuracies"]
    with pytest.raises(DemoFailed, match="stop it"):
        fresh(folder)
    kept.__exit__()

    again = demo(folder, "--rounds", "1", "--clients", "2")  # too little to keep its promise

    assert again.returncode == 1
    assert "The demo failed: the" in again.stdout
    assert processes_of(folder) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"updates_per_round": [5, 4]}, "4 updates"),
        ({"best_alone": 0.95}, "not better"),
        ({"accuracy": 0.92}, "below 93%"),
        ({"accuracies": [0.95]}, "only 1 of 2"),
        ({"rankings": {"SWAG": {"auroc": 0.6}}}, "SWAG does not find the errors"),
        ({"rankings": {"SWAG": {"auroc": None}}}, "SWAG does not find the errors"),
    ],
)
def test_a_broken_promise_is_named(change: dict[str, Any], said: str) -> None:
    assert broken_promise(WORKING) is None

    assert said in str(broken_promise(WORKING | change))


def test_each_site_knows_few_digits_and_together_they_know_all() -> None:
    sites = deal(5)

    for site in sites:
        counts = np.bincount(site.y, minlength=10)
        assert np.sort(counts)[-3:].sum() >= 0.85 * counts.sum()
        assert set(site.dominant) == set(np.argsort(counts)[-3:])
    assert set(np.concatenate([site.y for site in sites])) == set(range(10))


def test_the_test_set_is_balanced_apart_and_dealt_out_whole() -> None:
    x, _, test_x, test_y = load()
    sites = deal(5)

    counts = np.bincount(test_y)
    assert counts.max() - counts.min() <= 3
    assert sum(len(site.test_y) for site in sites) == len(test_y)
    assert sum(len(site.y) for site in sites) == len(x)
    assert np.array_equal(np.concatenate([site.test_x for site in sites]), test_x)


def test_corrupted_digits_are_the_test_set_five_times_and_the_same_each_time() -> None:
    _, _, test_x, test_y = load()

    images, labels = corrupted()

    parts = images.reshape(5, len(test_y), 64)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.array_equal(parts[0], test_x)
    assert np.array_equal(labels.reshape(5, -1), np.tile(test_y, (5, 1)))
    assert all(np.abs(part - parts[0]).mean() > 0.02 for part in parts[1:])
    assert np.array_equal(corrupted()[0], images)


def test_only_what_an_earlier_demo_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(DemoFailed, match="choose another"):
        fresh(tmp_path)

    assert (tmp_path / "thesis.txt").read_text() == "mine"
