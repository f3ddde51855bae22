"""Views: each parses, calls one service, answers."""
