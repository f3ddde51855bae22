"""The researcher's entrance: `fl = fl_client.connect(...)`, then `fl.models`, `fl.trainings`."""

from pathlib import Path

from fl_client.models import Models
from fl_client.trainings import Trainings
from fl_client.transport import Transport
from fl_client.users import Users


class Connection:
    """What one account can do at one server; a context manager that closes its sockets."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.users = Users(transport)
        self.models = Models(transport)
        self.trainings = Trainings(transport)

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    url: str,
    *,
    token: str | None = None,
    username: str | None = None,
    password: str | None = None,
    ca: str | Path | None = None,
) -> Connection:
    """Sends nothing yet. `ca` is a PEM file, and then the only authority that is believed.

    Without token and username everything is asked anonymously, which is enough to register.
    ValueError for an address that is no http(s) URL, and for `ca` with plain http.
    """
    return Connection(Transport(url, token=token, username=username, password=password, ca=ca))
