"""Algorithms, one a file: configuration at its top, losses as short methods; each owns its networks and optimizers."""
