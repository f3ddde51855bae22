"""Ways of delivering a message, by URL scheme; add one as a file here, with `@TRANSPORTS.register`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fl_server_core.registry import Registry


class Rejected(Exception):
    """The receiver (or a rule of ours) has said no: trying again would not help."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Unreachable(Exception):
    """Nobody answered in time; later somebody may."""


@dataclass(frozen=True)
class Message:
    """What is sent: `headers` belong to `body`, whose bytes they sign."""

    url: str
    body: bytes
    headers: dict[str, str]


class Transport(ABC):
    """Delivers one message once."""

    @abstractmethod
    def deliver(self, message: Message) -> int:
        """The 2xx status it was answered with; raises `Rejected` or `Unreachable`."""


TRANSPORTS: Registry[Transport] = Registry("fl_server_ai.notifications.transports")
