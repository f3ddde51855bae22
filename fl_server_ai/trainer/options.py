"""The trainer's options, under the name that other code knows. The web validates them, without torch."""

from fl_server_ai.services.training_options import TrainerOptions

__all__ = ["TrainerOptions"]
