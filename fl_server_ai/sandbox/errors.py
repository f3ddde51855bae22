"""How running a program can fail; each is the program's fault or its input's, and the worker goes on."""

from fl_server_core.exceptions import Invalid, TooLarge, Unavailable, Unusable


class ProgramFailed(Unusable):
    """The program raised an error, or answered something that is no tensor; the detail has its text."""

    code = "PROGRAM_FAILED"


class NoDropout(Unusable):
    """Dropout draws were asked for, and the program has no dropout layer that can be switched on."""

    code = "NO_DROPOUT"


class BadImage(Invalid):
    """The image is damaged, cut off, or neither PNG nor JPEG."""

    code = "BAD_IMAGE"


class ImageTooLarge(TooLarge):
    """The image has more pixels than are decoded, by what its header says."""

    code = "IMAGE_TOO_LARGE"


class InputShape(Invalid):
    """The input, prepared, doesn't fit the model's `input_shape`."""

    code = "INPUT_SHAPE"


class PreprocessingFailed(Unusable):
    """The model's preprocessing can't be done to this input; the detail names the step."""

    code = "PREPROCESSING_FAILED"


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
