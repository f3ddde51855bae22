"""The production settings with kill points; only tests can load these."""

import os
from pathlib import Path

from fl_server.settings.production import *  # noqa: F403

FL_KILL_POINTS = Path(os.environ["FL_KILL_POINTS"])
MIDDLEWARE = ["fl_server_api.answer_points.AnswerPointsMiddleware", *MIDDLEWARE]  # noqa: F405
