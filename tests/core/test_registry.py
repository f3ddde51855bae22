import sys
import threading
from pathlib import Path

import pytest

from fl_server_core.registry import Registry


def test_all_threads_that_ask_first_find_everything(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "slow_plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fl_server_core.registry import Registry\nITEMS = Registry('slow_plugins')\n"
    )
    (package / "one.py").write_text(
        "import time\nfrom slow_plugins import ITEMS\ntime.sleep(0.1)\n"
        "@ITEMS.register('one')\nclass One: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    items = __import__("slow_plugins").ITEMS
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        found.append("one" in items)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [True] * 8
    for name in [name for name in sys.modules if name.startswith("slow_plugins")]:
        del sys.modules[name]


def test_a_name_is_registered_once() -> None:
    registry: Registry[object] = Registry("json")
    registry.register("a")(int)

    with pytest.raises(ValueError, match="already registered"):
        registry.register("a")(str)
