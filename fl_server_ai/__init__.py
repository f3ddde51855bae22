"""What happens: trainer, events, aggregation, containers, notifications."""
