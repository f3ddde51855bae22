"""Django's PostgreSQL backend with a limit: however many threads ask, a process has only so many connections."""
