"""How much an update counts that was trained from an older version than the current one."""

from fl_server_core.exceptions import Invalid

KINDS = ("constant", "polynomial", "hinge")
EXPONENT = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0}  # of arXiv:1903.03934


def discount(kind: str, staleness: int, *, a: float | None = None, b: int = 4) -> float:
    """A factor in (0, 1] for an update that is `staleness` versions old; fresh ones have 1.

    arXiv:1903.03934, section 5.2: constant 1; polynomial (1 + s)^-a, a 0.5; hinge 1 up to s = b, then
    1 / (a (s - b) + 1), a 10. FedBuff (arXiv:2106.06639) uses the polynomial.
    """
    power = EXPONENT.get(kind, 0.0) if a is None else a
    if kind == "constant" or staleness <= 0:
        return 1.0
    if kind == "polynomial":
        return float((1 + staleness) ** -power)
    if kind == "hinge":
        return 1.0 if staleness <= b else 1.0 / (power * (staleness - b) + 1)
    raise Invalid(f"there is no staleness weight {kind!r}", code="BAD_OPTION")
