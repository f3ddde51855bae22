"""Django admin: one file a subject. Actions and deletions call the services that the API calls.

- `base.py`        what all pages share: read-only history, refusals as messages, links
- `html.py`        tables and small curves, escaped
- `people.py`      users and their tokens
- `weights.py`     global models, their versions, stored files
- `trainings.py`   trainings and who takes part; `overview.py` draws a training's page
- `login.py`       who guesses at passwords is stopped
- `updates.py`     what sites sent; decisions on what is in quarantine
- `history.py`     rounds, tasks, moments, metrics, events, messages: to read, never to change
"""

from django.contrib import admin

from fl_server_api.admin import history, people, trainings, updates, weights
from fl_server_api.admin.login import LoginForm, login

__all__ = ["history", "people", "trainings", "updates", "weights"]

admin.site.login_form = LoginForm
admin.site.login = login  # type: ignore[method-assign]
admin.site.site_header = "FL server"
admin.site.site_title = "FL server"
admin.site.index_title = "Trainings, models and people"
