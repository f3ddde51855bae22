"""Memory that threads of the web process give back can be used by the others."""

import subprocess
import sys

PROGRAM = """
import ctypes, sys, threading

if sys.argv[1] == "few":
    from fl_server.front.serving import few_arenas
    few_arenas()
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
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return done.stdout.count("<heap nr=")


def test_threads_of_the_web_share_two_arenas() -> None:
    assert arenas("few") <= 2 < arenas("as they come")
