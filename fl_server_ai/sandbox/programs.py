"""A program to run: which file, of which kind, for whom; and the check that it passes before torch sees it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fl_server_ai.containers.limits import Limits
from fl_server_ai.sandbox.exported import check_exported
from fl_server_ai.sandbox.operators import check_script

Kind = Literal["torchscript", "exported"]


@dataclass(frozen=True)
class Program:
    """`path` holds what `digest` names, and stays as it is: a warm child is found by the digest.

    `tenant`: children are not shared between tenants. A hostile program that stays warm could tell one
    user's inputs to the next; give each circle of users that may see each other's inputs a name.
    `before`: a TorchScript module that the one input goes through first, in the same child.
    """

    path: Path
    digest: str
    kind: Kind
    tenant: str = ""
    before: "Program | None" = None


def check_program(path: Path, kind: Kind, limits: Limits | None = None) -> None:
    """Refuse a program that could reach files or run Python; for intake, and before each cold start.

    Raises `ForbiddenOperator` and `PickledEntry`, which name what is wrong, or `BadContainer`. Needs no torch.
    """
    check = check_script if kind == "torchscript" else check_exported
    check(path, limits or Limits())
