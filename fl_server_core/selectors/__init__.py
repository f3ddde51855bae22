"""What reads data: one `visible_to(user)` query per model, which every list and lookup goes through."""

from fl_server_core.selectors.gaps import Gap, Missing, failure_code, gaps
from fl_server_core.selectors.visibility import (
    get_visible,
    groups_visible_to,
    inference_jobs_visible_to,
    is_admin,
    local_models_visible_to,
    metrics_visible_to,
    models_visible_to,
    notifications_visible_to,
    rounds_visible_to,
    tasks_visible_to,
    trainings_visible_to,
    uploads_visible_to,
    users_visible_to,
)

__all__ = [
    "Gap",
    "Missing",
    "failure_code",
    "gaps",
    "get_visible",
    "groups_visible_to",
    "inference_jobs_visible_to",
    "is_admin",
    "local_models_visible_to",
    "metrics_visible_to",
    "models_visible_to",
    "notifications_visible_to",
    "rounds_visible_to",
    "tasks_visible_to",
    "trainings_visible_to",
    "uploads_visible_to",
    "users_visible_to",
]
