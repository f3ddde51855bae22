"""The trainer: claims durable events, and does what each stands for."""
