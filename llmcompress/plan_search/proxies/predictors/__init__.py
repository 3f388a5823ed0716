"""Predictors of a plan's loss from its one-hot row: one algorithm = one file."""
