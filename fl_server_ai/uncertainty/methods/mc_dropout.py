"""Dropout left on while predicting: Gal and Ghahramani 2015, https://arxiv.org/abs/1506.02142."""

from fl_server_ai.uncertainty import UNCERTAINTY, Kind, Method
from fl_server_ai.uncertainty.options import CommonOptions


@UNCERTAINTY.register("MC_DROPOUT")
class MCDropout(Method[CommonOptions]):
    """N runs in evaluation mode with only the dropout layers at work: `dropout.switch_dropout`."""

    paper = "1506.02142"
    kind = Kind.DROPOUT
