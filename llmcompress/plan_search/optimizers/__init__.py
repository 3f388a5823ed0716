"""Optimizers of plans: one algorithm = one file."""
