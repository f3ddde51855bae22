"""Published results, reproduced through a running server: `make papers`."""
