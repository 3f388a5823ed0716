"""Benches: how products and small models are run in each runtime; one runtime = one file."""
