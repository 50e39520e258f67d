"""Operators: their protocol, what they are applied to, the kinds that `prox` and `groups` offer."""
