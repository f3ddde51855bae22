"""A virtual environment for the peers, made once; torch is our own, so nothing large is installed."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".bench-venv"
PACKAGES = ("flwr>=1.20", "nvflare>=2.6")


class NotInstallable(Exception):
    """pip or venv failed; the text is its last line."""


def peers_python(*, install: bool = True) -> Path:
    """The environment's Python; raises `NotInstallable`."""
    python, stamp = PLACE / "bin" / "python", PLACE / "installed"
    if not install:
        raise NotInstallable("left out with --no-peers")
    if stamp.exists():
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(PLACE)])
    _run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES])
    packages = next((PLACE / "lib").glob("python3*/site-packages"))
    # Behind its own packages on the path: what it has is its own, torch is ours.
    (packages / "torch-of-ours.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    stamp.write_text("\n".join(PACKAGES))
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstallable(said[-1] if said else f"exit status {done.returncode}")
