"""A fixture for tests that hold with and without the compiled loops: `pytestmark = pytest.mark.usefixtures("loops")`."""

from collections.abc import Iterator

import pytest

from fl_server_ai.aggregation import compiled

LOOPS = ["torch", "compiled"]


def use(loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, however small the models are."""
    worth = 0 if loops == "compiled" else 2**62
    monkeypatch.setattr(compiled, "WORTH", worth)
    monkeypatch.setattr(compiled, "_loaded", [])
    compiled.prepare(1)
    assert (compiled.kernels() is not None) == (loops == "compiled")


@pytest.fixture(scope="module", params=LOOPS)
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        yield request.param
