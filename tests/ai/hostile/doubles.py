"""Archives that two readers read differently: what the server checks must be what torch loads."""

import struct

from tests.ai.hostile.building import (
    BAD,
    CODE,
    Part,
    hostile,
    program,
    saved_parts,
    script_parts,
    state_dict,
    zipped,
)

GOOD = program(state_dict())
SAVES = CODE.replace("return", "torch.save(x, 'gone')\n    return")
# torch's zip reader takes capitals for small letters, and the last of equal names.
TWINS: dict[str, list[Part]] = {
    "DATA.PKL": [*saved_parts(GOOD), Part("archive/DATA.PKL", GOOD)],
    "Data/0": [*saved_parts(GOOD), Part("archive/Data/0", b"\0" * 16)],
    "BYTEORDER instead of byteorder": [
        *(part for part in saved_parts(GOOD) if not str(part.name).endswith("byteorder")),
        Part("archive/BYTEORDER", b"big"),
    ],
    "CODE/": [*script_parts(), Part("net/CODE/__torch__.py", SAVES.encode())],
    "Code/, another class": [*script_parts(), Part("net/Code/other.py", SAVES.encode())],
    "code/__torch__.PY": [*script_parts(), Part("net/code/__torch__.PY", SAVES.encode())],
    "CONSTANTS.PKL": [*script_parts(), Part("net/CONSTANTS.PKL", GOOD)],
    "bytecode.PKL": [*script_parts(), Part("net/bytecode.PKL", GOOD)],
}
for _name, _parts in TWINS.items():
    hostile(f"a name that differs by capitals: {_name}", BAD)(lambda parts=_parts: zipped(*parts))


def two_directories(record_size: int = 44, disks: int = 1) -> bytes:
    """One archive with two directories: the locator means the first, a hasty reader takes the last."""
    other = program(state_dict())
    data = zipped(*saved_parts(GOOD))
    size, offset = struct.unpack("<II", data[-10:-2])
    directory = data[offset : offset + size]
    count = len(saved_parts(GOOD))

    def record(start: int) -> bytes:
        return b"PK\x06\x06" + struct.pack(
            "<QHHIIQQQQ", record_size, 45, 45, 0, 0, count, count, size, start
        )

    body = data[:offset] + other
    first = len(body)
    body += directory
    meant = len(body)
    body += record(first)
    last = len(body)
    body += directory + record(last)
    body += b"PK\x06\x07" + struct.pack("<IQI", 0, meant, disks)
    full = (0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return body + b"PK\x05\x06" + struct.pack("<HHHHIIH", *full)


hostile("two directories, and a locator that means the other", BAD)(two_directories)
hostile("two directories on two disks", BAD)(lambda: two_directories(disks=2))
hostile("a count of entries that is too small", BAD)(
    lambda: zipped(*saved_parts(GOOD), entries=len(saved_parts(GOOD)) - 1)
)
