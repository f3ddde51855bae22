"""What makes one process a whole server: web threads, one warm child for tensors, a reconciler."""
