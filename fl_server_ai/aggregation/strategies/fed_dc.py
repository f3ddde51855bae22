"""Federated daisy-chaining: Kamp, Fischer, Vreeken 2023, https://arxiv.org/abs/2110.03469."""

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.aggregation.strategies.fed_avg import FedAvg


@STRATEGIES.register("FedDC")
class FedDC(FedAvg):
    """The mean of models that each went through several sites: for sites with very little data.

    The chaining itself is the trainer's: `options.daisy_chain_period` works with every strategy, and
    this name insists on it.
    """

    paper = "2110.03469"
    by_number = False  # what is left out at one site has been trained at another
