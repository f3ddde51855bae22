"""FedNova's normalisation: how much all local gradients count together. arXiv:2007.07481."""


def norm(steps: int, *, momentum: float = 0.0, lr: float = 0.0, mu: float = 0.0) -> float:
    """The L1 norm of a_k in the paper, to be sent as `extras={"fednova.norm": ...}` where `num_steps` alone would not do.

    Plain SGD: the steps. SGD with momentum rho: (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho). With a
    proximal term mu and learning rate lr: (1 - (1 - lr mu)^tau) / (lr mu). ValueError for both at once.
    """
    if momentum and mu:
        raise ValueError("the paper has no norm for momentum and a proximal term together")
    if momentum:
        return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    shrink = lr * mu
    return (1 - (1 - shrink) ** steps) / shrink if shrink else float(steps)
