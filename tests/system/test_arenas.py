"""Memory that threads of the web process give back can be used by the others."""

import subprocess
import sys

ARENAS = """
import ctypes, sys, threading

if sys.argv[1] == "frugal":
    from fl_server.front.serving import frugal_malloc
    frugal_malloc()
together = threading.Barrier(30)

def work():
    together.wait()
    kept = [bytearray(3000) for _ in range(50)]
    together.wait()

threads = [threading.Thread(target=work) for _ in range(30)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def arenas(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", ARENAS, how], capture_output=True, text=True, check=True
    )
    return done.stdout.count("<heap nr=")


LARGE = """
import ctypes, sys

if sys.argv[1] == "frugal":
    from fl_server.front.serving import frugal_malloc
    frugal_malloc()


class Found(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Found
bytes(300_000)  # freed at once
before = mallinfo().hblkhd
kept = bytes(200_000)
print(mallinfo().hblkhd - before)
"""


def mapped(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_large_blocks_have_memory_of_their_own_whatever_was_freed_before() -> None:
    assert mapped("frugal") >= 200_000 > mapped("as they come")


def test_threads_of_the_web_share_two_arenas() -> None:
    assert arenas("frugal") <= 2 < arenas("as they come")
