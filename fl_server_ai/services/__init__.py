"""Services that may move a training forward, or that touch weights. Torch-free: the web calls them."""
