"""Torch archives whose zip records lie, contradict each other, or unpack without end."""

import functools
import struct
import zlib
from collections.abc import Callable
from typing import Any

from tests.ai.hostile.building import (
    BAD,
    FOUR,
    HEADER,
    HOSTILE,
    MANY,
    NO_STATE,
    TOO_LARGE,
    UNKNOWN,
    Part,
    call,
    hostile,
    module,
    named,
    number,
    numbers,
    path,
    program,
    saved,
    saved_parts,
    script_parts,
    state_dict,
    storage,
    tensor,
    zeros_packed,
    zipped,
)  # fmt: skip

GOOD = program(state_dict())
LIMIT_BREAKING = 96 * 2**20  # more than all compressed entries may unpack to


def changed(entry: str, **lies: Any) -> bytes:
    """The honest archive, in which one entry lies."""
    parts = saved_parts(GOOD)
    for part in parts:
        if part.name == f"archive/{entry}":
            for name, value in lies.items():
                setattr(part, name, value)
    return zipped(*parts)


def with_more(*more: Part) -> bytes:
    return zipped(*saved_parts(GOOD), *more)


ZIP64_PLACES = b"\xff\xff\xff\xff"


def zip64_extra(*values: int) -> bytes:
    return struct.pack("<HH", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def zip64_end(count: int | None, size: int | None, start: int | None) -> Callable[..., bytes]:
    """The records after the directory, with these lies in the zip64 one."""

    def end(true_count: int, true_size: int, true_start: int) -> bytes:
        counts = true_count if count is None else count
        sizes, starts = true_size if size is None else size, true_start if start is None else start
        record = b"PK\x06\x06" + struct.pack(
            "<QHHIIQQQQ", 44, 20, 20, 0, 0, counts, counts, sizes, starts
        )
        locator = b"PK\x06\x07" + struct.pack("<IQI", 0, true_start + true_size, 1)
        return (
            record
            + locator
            + b"PK\x05\x06"
            + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        )

    return end


HUGE = 10 * 2**30
FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    # Numbers that are not there.
    "ten gigabytes claimed in a kilobyte, stored": (
        lambda: zipped(
            *saved_parts(
                program(
                    named({
                        "w": tensor(storage(count=number(HUGE // 4)), size=numbers(HUGE // 4))
                    })
                ), {},
            ),
            Part(
                "archive/data/0", FOUR, size=0xFFFFFFFF, packed_size=0xFFFFFFFF,
                extra=zip64_extra(HUGE, HUGE), central_extra=zip64_extra(HUGE, HUGE),
            ),
        ), (BAD, TOO_LARGE),
    ),
    "ten gigabytes claimed in a kilobyte, deflated": (
        lambda: zipped(
            *saved_parts(GOOD, {}),
            Part(
                "archive/data/0", FOUR, deflate=True, size=0xFFFFFFFF,
                extra=zip64_extra(HUGE), central_extra=zip64_extra(HUGE),
            ),
        ), (BAD, TOO_LARGE),
    ),
    "three gigabytes claimed in data/0": (
        lambda: changed("data/0", size=3 * 2**30, packed_size=3 * 2**30), (BAD,),
    ),
    "a storage that is cut short": (lambda: changed("data/0", data=FOUR[:-1]), (BAD,)),
    "a storage that is too long": (lambda: changed("data/0", data=FOUR + b"more"), (BAD,)),
    "a storage that is missing": (lambda: zipped(*saved_parts(GOOD, {})), (BAD,)),
    "a storage that is compressed": (lambda: changed("data/0", deflate=True), (BAD,)),
    "a storage that claims not to be compressed": (
        lambda: changed("data/0", deflate=True, method=0, size=16), (BAD,),
    ),
    # Bombs.
    "a bomb in data.pkl": (
        lambda: zipped(
            Part(
                "archive/data.pkl", zeros_packed(128 * 2**20), method=8, size=128 * 2**20, crc=0
            )
        ), (TOO_LARGE, HEADER, BAD),
    ),
    "a bomb in data.pkl that claims to be small": (
        lambda: zipped(
            Part("archive/data.pkl", zeros_packed(128 * 2**20), method=8, size=1000, crc=0),
            *saved_parts(GOOD)[1:],
        ), (BAD, TOO_LARGE, HOSTILE),
    ),
    "a bomb in data.pkl that claims seven megabytes": (
        lambda: zipped(
            Part("archive/data.pkl", zeros_packed(128 * 2**20), method=8, size=7 * 2**20, crc=0),
            *saved_parts(GOOD)[1:],
        ), (BAD, TOO_LARGE, HOSTILE),
    ),
    "a bomb in byteorder that claims to be small": (
        lambda: changed(
            "byteorder", data=zeros_packed(128 * 2**20), method=8, size=6, crc=0
        ), (BAD, TOO_LARGE),
    ),
    "a bomb in data/0": (
        lambda: changed(
            "data/0", data=zeros_packed(128 * 2**20), method=8, size=128 * 2**20, crc=0
        ), (BAD, TOO_LARGE),
    ),
    "a bomb in a debug file": (
        lambda: with_more(
            Part(
                "archive/data.pkl.debug_pkl", zeros_packed(LIMIT_BREAKING), method=8,
                size=LIMIT_BREAKING, crc=0,
            )
        ), (TOO_LARGE,),
    ),
    "a bomb in the code": (
        lambda: zipped(
            *script_parts(),
            Part(
                "net/code/__torch__/x.py", zeros_packed(LIMIT_BREAKING), method=8,
                size=LIMIT_BREAKING, crc=0,
            ),
        ), (TOO_LARGE, HEADER),
    ),
    "a bomb in the code that claims to be small": (
        lambda: zipped(
            *script_parts(),
            Part(
                "net/code/__torch__/x.py", zeros_packed(128 * 2**20), method=8, size=99, crc=0
            ),
        ), (BAD, TOO_LARGE),
    ),
    # Names.
    "data.pkl twice": (lambda: zipped(saved_parts(GOOD)[0], *saved_parts(GOOD)), (BAD,)),
    "data/0 twice": (lambda: with_more(Part("archive/data/0", bytes(16))), (BAD,)),
    "no data.pkl": (lambda: zipped(*saved_parts(GOOD)[1:]), (BAD, UNKNOWN)),
    "no data.pkl in a script": (lambda: zipped(*script_parts()[1:]), (BAD,)),
    "two folders": (lambda: with_more(Part("other/data/1", FOUR)), (BAD,)),
    "two folders with a program each": (lambda: with_more(Part("other/data.pkl", GOOD)), (BAD,)),
    "no folder": (
        lambda: zipped(Part("data.pkl", GOOD), Part("data/0", FOUR), Part("version", b"3\n")), (BAD,),
    ),
    "a folder named ..": (lambda: with_more(Part("archive/../../etc/x", b"x")), (BAD,)),
    "a folder named . before a storage": (lambda: with_more(Part("archive/./data/1", b"x")), (BAD,)),
    "an absolute name": (lambda: with_more(Part("/etc/passwd", b"x")), (BAD,)),
    "a name with two slashes": (lambda: with_more(Part("archive//data/1", b"x")), (BAD,)),
    "a name with backslashes": (lambda: with_more(Part("archive\\..\\x", b"x")), (BAD,)),
    "a name with a NUL": (lambda: with_more(Part("archive/data.pkl\0x", b"x")), (BAD,)),
    "a name that is empty": (lambda: with_more(Part("", b"x")), (BAD,)),
    "a name that is no UTF-8": (lambda: with_more(Part(b"archive/\xff\xfe", b"x")), (BAD,)),
    "a link as an entry": (lambda: with_more(Part("archive", b"/etc/passwd")), (BAD,)),
    # Records that contradict each other.
    "a wrong CRC in data/0": (lambda: changed("data/0", crc=1), (BAD,)),
    "a wrong CRC in data.pkl": (lambda: changed("data.pkl", crc=1), (BAD,)),
    "a wrong CRC in data/0's own record": (lambda: changed("data/0", local_crc=1), (BAD,)),
    "a wrong CRC in data.pkl's own record": (lambda: changed("data.pkl", local_crc=1), (BAD,)),
    "another name in data/0's own record": (
        lambda: changed("data/0", local_name=b"archive/data/1"), (BAD,),
    ),
    "another size in data/0's own record": (lambda: changed("data/0", local_size=4), (BAD,)),
    "a descriptor with another CRC": (
        lambda: changed(
            "data/0", flags=0x808, after=b"PK\x07\x08" + struct.pack("<III", 1, 16, 16)
        ), (BAD,),
    ),
    "a descriptor that is not there": (lambda: changed("version", flags=0x808), (BAD,)),
    "an encrypted program": (lambda: changed("data.pkl", flags=0x801), (BAD, UNKNOWN)),
    "an encrypted storage": (lambda: changed("data/0", flags=0x801), (BAD, UNKNOWN)),
    "a program packed in an unknown way": (lambda: changed("data.pkl", method=99), (BAD, UNKNOWN)),
    "a program packed by LZMA": (lambda: changed("data.pkl", method=14), (BAD, UNKNOWN)),
    "a record's place in another's data": (lambda: changed("data/0", offset=40), (BAD,)),
    "a record's place beyond the file": (lambda: changed("data/0", offset=2**31), (BAD, UNKNOWN)),
    # The end.
    "a comment": (lambda: zipped(*saved_parts(GOOD), comment=b"hello"), (BAD, UNKNOWN)),
    "something after the end": (lambda: saved(state_dict()) + b"more", (BAD, UNKNOWN)),
    # torch follows the directory's offsets from the file's start and reads the first one's numbers.
    "another archive after the end": (
        lambda: saved(state_dict()) + saved(state_dict(), {"0": bytes(16)}), (BAD, UNKNOWN),
    ),
    "something before the start": (lambda: b"PK\x03\x04" + saved(state_dict()), (BAD, UNKNOWN)),
    "a directory of 4 GB": (
        lambda: zipped(*saved_parts(GOOD), directory_size=2**32 - 2), (BAD, UNKNOWN),
    ),
    "a directory that begins elsewhere": (
        lambda: zipped(*saved_parts(GOOD), directory_offset=2**31), (BAD, UNKNOWN),
    ),
    "a directory of 2^32 entries": (
        lambda: zipped(*saved_parts(GOOD), end=zip64_end(2**32, 46 * 2**32, None)), (BAD, UNKNOWN),
    ),
    "a directory of 2^63 bytes": (
        lambda: zipped(*saved_parts(GOOD), end=zip64_end(None, 2**63, None)), (BAD, UNKNOWN),
    ),
    "a directory at 2^63": (
        lambda: zipped(*saved_parts(GOOD), end=zip64_end(None, None, 2**63)), (BAD, UNKNOWN),
    ),
    "an empty directory": (lambda: zipped(*saved_parts(GOOD), directory_size=0), (BAD, UNKNOWN)),
    "thirty thousand entries": (
        lambda: zipped(
            *saved_parts(GOOD), *(Part(f"archive/data/{i}") for i in range(1, 30_000))
        ), (BAD, UNKNOWN, MANY),
    ),
    # What torch writes beside the weights.
    "numbers of a big-endian machine": (lambda: changed("byteorder", data=b"big"), (BAD,)),
    "an unknown byte order": (lambda: changed("byteorder", data=b"middle"), (BAD,)),
    "a byte order of a megabyte": (lambda: changed("byteorder", data=b"l" * 10**6), (BAD, HEADER)),
    "a hostile program in a script's constants": (
        lambda: zipped(
            *(
                Part(part.name, program(call(path("os", "system"), number(1))))
                if part.name == "net/constants.pkl" else part
                for part in script_parts()
            )
        ), (HOSTILE,),
    ),
    "a whole module named as a script": (
        lambda: zipped(
            *saved_parts(program(module())), Part("archive/constants.pkl", program(b")"))
        ), (BAD, NO_STATE),
    ),
}  # fmt: skip
for _name, (_build, _codes) in FILES.items():
    hostile(_name, *_codes)(_build)


@hostile("two entries that share their bytes", BAD)
def sharing() -> bytes:
    """data/1 is listed with a record of its own that lies in the data of data/0."""
    name = b"archive/data/1"
    inner = b"PK\x03\x04" + struct.pack(
        "<HHHHHIIIHH", 20, 0x800, 0, 0, 33, zlib.crc32(FOUR), 16, 16, len(name), 0
    ) + name + FOUR  # fmt: skip
    parts = saved_parts(GOOD, {})
    before = len(zipped(*parts, entries=0).split(b"PK\x01\x02")[0])
    outer = Part("archive/data/0", inner)
    start = before + 30 + len(b"archive/data/0")
    return zipped(*parts, outer, Part(name, FOUR, offset=start))


def _two(second: bytes) -> bytes:
    return program(named({"w": tensor(), "x": tensor(storage(second))}))


@hostile("two entries with one record", BAD)
def one_record() -> bytes:
    parts = saved_parts(GOOD)
    at = zipped(*parts).index(b"PK\x03\x04", zipped(*parts).index(b"little"))
    return zipped(*parts, Part("archive/data/1", FOUR, offset=at))


@hostile("a storage whose bytes are the archive's end", BAD)
def storage_over_the_end() -> bytes:
    """Its record's extra field reaches over the directory; writing new weights would destroy it."""
    value = program(
        named({
            "w": tensor(
                storage(cls=path("torch", "ByteStorage"), count=number(22)), size=numbers(22)
            )
        })
    )  # fmt: skip
    parts = saved_parts(value, {})

    def made(reach: int, crc: int) -> bytes:
        lying = Part("archive/data/0", size=22, packed_size=22, crc=crc)
        lying.listed = True
        data = bytearray(zipped(*parts, lying))
        record = bytes(data).rindex(b"PK\x03\x04")
        data[record + 28 : record + 30] = struct.pack("<H", reach)
        return bytes(data)

    plain = made(0, 0)
    start = plain.rindex(b"PK\x03\x04") + 30 + len("archive/data/0")
    end = len(plain) - 22
    return made(end - start, zlib.crc32(plain[end:]))


for _share in (1, 5, 30, 60, 80, 95, 99):
    hostile(f"an archive cut at {_share} %", BAD, UNKNOWN)(
        functools.partial(
            lambda share: saved(state_dict())[: len(saved(state_dict())) * share // 100], _share
        )
    )
hostile("an archive without its last byte", BAD, UNKNOWN)(lambda: saved(state_dict())[:-1])
