"""Dropout is switched on, and nothing else is."""

import io

import pytest
import torch
from torch import nn

from fl_server_ai.uncertainty.dropout import LAYERS, switch_dropout
from fl_server_core.exceptions import Invalid


class Own(nn.Dropout):
    """Somebody's own kind of dropout."""


class Net(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(p)
        self.alpha = nn.AlphaDropout(p)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.alpha(self.drop(self.norm(self.first(x)))))  # type: ignore[no-any-return]


def inputs() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def reloaded(module: torch.jit.ScriptModule) -> nn.Module:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)  # type: ignore[no-untyped-call]
    return torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call, no-any-return]


def check_draws(module: nn.Module) -> None:
    statistics = (
        module.state_dict()["norm.running_mean"].clone()
        if "norm.running_mean" in module.state_dict()
        else None
    )
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(module(inputs()))
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    if statistics is not None:
        assert torch.equal(module.state_dict()["norm.running_mean"], statistics)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_each_kind_of_dropout_is_switched_on(name: str) -> None:
    module = nn.Sequential(getattr(nn, name)(0.3), nn.BatchNorm1d(4)).train()

    assert switch_dropout(module) == 1

    assert module[0].training
    assert not module.training
    assert not module[1].training


def test_subclasses_and_nested_layers_count() -> None:
    module = nn.Sequential(Own(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))

    assert switch_dropout(module) == 2
    assert switch_dropout(module) == 2
    assert not module[1].training


def test_a_plain_model_draws_and_keeps_its_statistics() -> None:
    module = Net()

    assert switch_dropout(module) == 2

    check_draws(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("through_file", [False, True])
def test_a_scripted_model_draws_and_keeps_its_statistics(*, through_file: bool) -> None:
    scripted = torch.jit.script(Net().train())
    module = reloaded(scripted) if through_file else scripted

    assert switch_dropout(module) == 2

    assert not dict(module.named_modules())["norm"].training
    check_draws(module)


def test_an_exported_program_draws() -> None:
    module = torch.export.export(Net().eval(), (inputs(),)).module()
    before = module(inputs())

    assert switch_dropout(module) == 2

    assert not torch.equal(module(inputs()), before)
    assert switch_dropout(module) == 2
    check_draws(module)


@pytest.mark.parametrize("p", [0.0, None])
def test_a_model_without_dropout_is_refused_with_a_next_step(p: float | None) -> None:
    module = nn.Linear(4, 2) if p is None else Net(p)

    for kind in (module, torch.export.export(module.eval(), (inputs(),)).module()):
        with pytest.raises(Invalid, match="upload it scripted") as refusal:
            switch_dropout(kind)
        assert refusal.value.error_code == "NO_DROPOUT"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("through_file", [False, True])
def test_a_traced_model_is_refused_because_its_dropout_cannot_be_switched(
    *, through_file: bool
) -> None:
    traced = torch.jit.trace(Net().eval(), inputs())  # type: ignore[no-untyped-call]

    with pytest.raises(Invalid):
        switch_dropout(reloaded(traced) if through_file else traced)
