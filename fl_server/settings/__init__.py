"""The only place that reads the environment; `env.py` says how, and lists every variable."""
