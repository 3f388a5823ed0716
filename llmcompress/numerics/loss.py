"""The loss of a causal language model. B = sequences, T = tokens, V = vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LOGITS_BYTES = 2**28
"""How much one batch of float32 logits may take; more windows at once make nothing faster on a CPU."""

LOGITS_COPIES = 3
"""As large as the logits and alive at once when a gradient is taken: log-probabilities, their gradient, the logits'."""

_IGNORED = -100


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of every token after the first, in nats, computed in float32.

    The last position predicts nothing. It is ignored, not cut off: that would copy all the other logits.
    """
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], _IGNORED)], dim=1)
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.to(logits_BTV.device).flatten(), ignore_index=_IGNORED
    )


def in_batches(windows_NT: Tensor, batch: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Windows in batches of at most so many, and of no more than may have their logits at once."""
    return torch.split(windows_NT, min(batch, windows_at_once(windows_NT.shape[1], vocabulary)))


def windows_at_once(tokens: int, vocabulary: int) -> int:
    """How many windows of so many tokens have logits of `LOGITS_BYTES` together; at least one."""
    return max(1, LOGITS_BYTES // (4 * tokens * vocabulary))
