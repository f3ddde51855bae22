"""The tables: who takes part (users), what is trained (weights), and what happened (rounds, metrics)."""

from fl_server_core.models.clients import ClientProfile
from fl_server_core.models.events import SliceKind, TrainerEvent, WorkSlice
from fl_server_core.models.idempotency import IdempotencyKey
from fl_server_core.models.inference import InferenceJob
from fl_server_core.models.metrics import Metric
from fl_server_core.models.moments import SwagMoments
from fl_server_core.models.notifications import Notification
from fl_server_core.models.rounds import LocalModel, Round, Task
from fl_server_core.models.statistics import ModelStatistics
from fl_server_core.models.trainings import Participant, Training
from fl_server_core.models.uploads import Upload
from fl_server_core.models.users import ApiToken, User
from fl_server_core.models.weights import Blob, GlobalModel, MeanMember, ModelVersion

__all__ = [
    "ApiToken",
    "Blob",
    "ClientProfile",
    "GlobalModel",
    "IdempotencyKey",
    "InferenceJob",
    "LocalModel",
    "MeanMember",
    "Metric",
    "ModelStatistics",
    "ModelVersion",
    "Notification",
    "Participant",
    "Round",
    "SliceKind",
    "SwagMoments",
    "Task",
    "TrainerEvent",
    "Training",
    "Upload",
    "User",
    "WorkSlice",
]
