"""Updates that must be refused: for each its name, how it is sent, and what the server has to say to it.

- `case.py`      one line of the table; the trainings that updates are sent to, and the doors they come in by
- `asking.py`    who sends, for which round and version, and the fields of the form
- `bodies.py`    multipart bodies that are put together wrongly, and packed ones
- `files.py`     containers that are damaged, and what is none
- `contents.py`  tensors, numbers, kinds, encodings and extras

Hostile files, which want to run code or to eat memory, are in `tests/ai/hostile`.
"""

from tests.api.malformed import asking, bodies, contents, files
from tests.api.malformed.case import Case, Send, Stage

GROUPS: dict[str, list[Case]] = {
    "asking": asking.CASES,
    "bodies": bodies.CASES,
    "files": files.CASES,
    "contents": contents.CASES,
}

FILES = ("files", "contents")  # whose cases are a file each, which may come in by any door

__all__ = ["FILES", "GROUPS", "Case", "Send", "Stage"]
