"""Levels: what every option makes of every linear, computed once; candidates are put together from them."""
