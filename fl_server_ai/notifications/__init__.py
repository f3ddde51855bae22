"""Reaching clients: wake-ups for those who poll, webhooks for those who listen."""
