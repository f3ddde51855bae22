"""How running a program can fail; each is the program's fault, and the worker goes on."""

from fl_server_core.exceptions import Unavailable, Unusable


class ProgramFailed(Unusable):
    """The program raised an error, or answered something that is no tensor; the detail has its text."""

    code = "PROGRAM_FAILED"


class NoDropout(Unusable):
    """Dropout draws were asked for, and the program has no dropout layer that can be switched on."""

    code = "NO_DROPOUT"


class InputMismatch(Unusable):
    """The program takes inputs of another shape; the detail says which."""

    code = "INPUT_SHAPE"


class SandboxTimeout(Unusable):
    """The program took longer than it was given, and was ended."""

    code = "SANDBOX_TIMEOUT"


class SandboxMemory(Unusable):
    """The program wanted more memory than it is given, or answered more than may be answered."""

    code = "SANDBOX_MEMORY"


class SandboxCrashed(Unusable):
    """The program's process ended, or answered what no honest child answers."""

    code = "SANDBOX_CRASHED"


class SandboxUnavailable(Unavailable):
    """No child could be started, which is this server's fault: its log says why."""

    code = "SANDBOX_UNAVAILABLE"
