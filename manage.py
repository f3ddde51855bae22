#!/usr/bin/env python
"""Django's command line; the embedded server's settings unless told otherwise."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fl_server.settings.embedded")
    from django.core.management import execute_from_command_line

    from fl_server.settings.env import BadSetting

    try:
        execute_from_command_line(sys.argv)
    except BadSetting as error:
        sys.exit(f"manage.py: {error}")
