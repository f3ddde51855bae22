"""The names that other code knows are where the mission map says, and what is to come is not there yet."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/explanation/decisions/mission-map.md"
ROWS = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| (there|comes)", PAGE.read_text(), re.MULTILINE)
FIXED = {
    "ModelTrainer", "ModelTrainerEvent", "TrainingRoundFinished", "SWAGRoundFinished",
    "DaisyChainRoundFinished", "ModelTestFinished", "TrainerOptions", "process_trainer_task",
    "dispatch_trainer_task", "User", "Training", "GlobalModel", "LocalModel", "Metric",
}  # fmt: skip


def test_the_map_lists_every_name_of_the_original_design() -> None:
    assert {name for name, _, _ in ROWS} == FIXED


@pytest.mark.parametrize(("name", "module", "standing"), ROWS)
def test_a_name_is_where_the_map_says(name: str, module: str, standing: str) -> None:
    if standing == "there":
        assert hasattr(importlib.import_module(module), name)
    else:
        assert importlib.util.find_spec(module) is None


def test_the_trainer_and_its_events_offer_what_others_call() -> None:
    trainer = importlib.import_module("fl_server_ai.trainer.model_trainer").ModelTrainer
    events = importlib.import_module("fl_server_ai.trainer.events")

    for step in ("start", "start_round", "test_round", "start_swag_round", "finish", "handle"):
        assert callable(getattr(trainer, step))
    for event in (events.TrainingRoundFinished, events.ModelTestFinished):
        assert issubclass(event, events.ModelTrainerEvent)
        assert callable(event.handle)
        assert callable(event.next)
