"""Search: which compression for which part of a model, on exact bytes and measured speed; the result is a recipe."""
