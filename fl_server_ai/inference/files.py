"""Files of programs that were asked lately: opened once, and not for each question."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fl_server_ai.services.models import Rendered, weights_open
from fl_server_core.models import Blob, GlobalModel

MOST = 8  # each is a name of its own for a file that the cache of renderings has as well

_held: OrderedDict[tuple[str, str], tuple[Rendered, ExitStack]] = OrderedDict()


@contextmanager
def program_file(model: GlobalModel, weights: Blob) -> Iterator[Rendered]:
    """A model's program with these weights in it; the file is there until the end of the context.

    From one thread at a time. A kill leaves files that the sweep removes by age; one that it removes from
    under us is made anew.
    """
    key = (model.template.digest if model.template else "", weights.name)
    file, stack = _held.pop(key, (None, ExitStack()))
    if file is None or not file.path.exists():
        stack.close()
        with ExitStack() as opened:
            fresh = weights_open(model=model, blob=weights, container=model.container)
            file = opened.enter_context(fresh)
            stack = opened.pop_all()
    _held[key] = file, stack
    while len(_held) > MOST:
        _, (_, oldest) = _held.popitem(last=False)
        oldest.close()
    yield file


def close() -> None:
    """Let go of all files."""
    while _held:
        _, (_, stack) = _held.popitem()
        stack.close()
