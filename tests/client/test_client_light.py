"""What importing the package costs, and on which Python it can be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_importing_the_client_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'django', 'celery', 'rest_framework', 'safetensors'}"
    code = f"import fl_client, sys; print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob("fl_client/*.py")), ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))
