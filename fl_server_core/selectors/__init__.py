"""What reads data: one `visible_to(user)` query per model, which every list and lookup goes through."""

from fl_server_core.selectors.gaps import OUTCOMES, Gap, Missing, gaps, outcome, with_gaps
from fl_server_core.selectors.parts import Part, failure_code, part_of, told_at
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
    versions_visible_to,
)

__all__ = [
    "OUTCOMES",
    "Gap",
    "Missing",
    "Part",
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
    "outcome",
    "part_of",
    "rounds_visible_to",
    "tasks_visible_to",
    "told_at",
    "trainings_visible_to",
    "uploads_visible_to",
    "users_visible_to",
    "versions_visible_to",
    "with_gaps",
]
