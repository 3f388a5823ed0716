"""Searches for plans: which compression for which part of a model, on exact bytes and measured speed; found recipes."""
