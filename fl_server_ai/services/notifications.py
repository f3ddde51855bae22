"""Delivers webhook messages."""


def notifications_deliver() -> int:
    """Nothing yet."""
    return 0
