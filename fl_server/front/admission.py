"""Whose large body it is that one request brings: a user's once he is known, nobody's before."""

from fl_server_ai.services.places import Places

NOBODY = ""


class Admission:
    """A place among the bodies under way, taken at most once, given back at the end of the block."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._holder: str | None = None

    def admit(self, user_id: str) -> bool:
        """Take a place as this user; False if he, or everybody together, has too many. Again: as before."""
        if self._holder is None and self._places.take(user_id):
            self._holder = user_id
        return self._holder is not None

    def certain(self) -> bool:
        """Asked when the body is wanted; who reads it before the user is known shares nobody's places."""
        return self.admit(NOBODY)

    def __enter__(self) -> "Admission":
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            self._places.give_back(self._holder)
