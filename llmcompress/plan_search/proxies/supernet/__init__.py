"""One set of weights for many sizes of a model: nested feed-forward networks, and blocks that can be skipped."""
