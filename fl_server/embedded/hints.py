"""Where hints go in a management command beside the server: nowhere, its reconciler finds the rows."""

import logging

log = logging.getLogger("fl.server")


def ignore_hint(task: str, ids: list[int]) -> None:
    """`serve` and its child put their own in this place."""
    log.debug("%s%s waits for the next sweep of the server", task, ids)
