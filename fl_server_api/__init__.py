"""How it is asked for: parse, call one service, answer."""
