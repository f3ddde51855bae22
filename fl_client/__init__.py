"""Take part in federated trainings (`Client`, `run`), or start them (`connect`).

Importing this loads neither NumPy nor torch.
"""

from fl_client import encodings, fednova, personal, prox, torch_support
from fl_client.agent import run
from fl_client.client import Client, Context, EvaluateResult, FitResult, SwagResult
from fl_client.connection import Connection, connect
from fl_client.errors import (
    AuthenticationFailed,
    BrokenFile,
    Conflict,
    ConnectionFailed,
    FLError,
    NotFound,
    NotPermitted,
    ServerError,
    Stopped,
    Throttled,
    TooLarge,
    TrainingFailed,
    Unusable,
)
from fl_client.scaffold import Scaffold
from fl_client.swag import SwagCollector
from fl_client.trainings import Training

__version__ = "0.1.0"

__all__ = [
    "AuthenticationFailed",
    "BrokenFile",
    "Client",
    "Conflict",
    "Connection",
    "ConnectionFailed",
    "Context",
    "EvaluateResult",
    "FLError",
    "FitResult",
    "NotFound",
    "NotPermitted",
    "Scaffold",
    "ServerError",
    "Stopped",
    "SwagCollector",
    "SwagResult",
    "Throttled",
    "TooLarge",
    "Training",
    "TrainingFailed",
    "Unusable",
    "connect",
    "encodings",
    "fednova",
    "personal",
    "prox",
    "run",
    "torch_support",
]
