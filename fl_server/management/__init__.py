"""Commands that put the server together: `serve` and `bootstrap`."""
