"""What happens inside a model during one forward pass: hidden states after blocks, inputs of attentions.

B = samples, T = tokens, H = query heads, G = key and value heads, D = width of a block or of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.skeleton import find_blocks


@dataclass(frozen=True)
class Wanted:
    """What to observe."""

    hidden: bool = False
    attention: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """What one attention computed with, after rotary embeddings."""

    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor
    scaling: float


@dataclass(frozen=True)
class Features:
    """One forward pass, in the order of the blocks."""

    hidden: list[Tensor] = field(default_factory=list)
    """B×T×D, the output of every block."""
    attention: list[AttentionCall] = field(default_factory=list)


@contextmanager
def observed(model: PreTrainedModel, wanted: Wanted) -> Iterator[Features]:
    """Fills in what the forward passes inside this context show.

    Attention is observed where transformers looks it up by its name, so `eager`, which has none, is refused.

    Raises: CompressError where the attention cannot be observed.
    """
    found = Features()
    with ExitStack() as stack:
        if wanted.hidden:
            for _, block in find_blocks(model):
                stack.callback(block.register_forward_hook(_output_taken(found)).remove)
        if wanted.attention:
            stack.enter_context(_attention_calls(model, found))
        yield found
    if wanted.attention and len(found.attention) != len(find_blocks(model)):
        raise _not_observed(model)


def _output_taken(found: Features) -> Any:
    def take(_: nn.Module, __: Any, output: Any) -> None:
        found.hidden.append(output if isinstance(output, Tensor) else output[0])

    return take


@contextmanager
def _attention_calls(model: PreTrainedModel, found: Features) -> Iterator[None]:
    name = model.config.get_text_config()._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise _not_observed(model)
    compute = ALL_ATTENTION_FUNCTIONS[name]

    def seen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        scaling = options.get("scaling")
        found.attention.append(AttentionCall(query, key, value, scaling or query.shape[-1] ** -0.5))
        return compute(module, query, key, value, *rest, **options)

    ALL_ATTENTION_FUNCTIONS[name] = seen
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not compute:  # someone else's override
            ALL_ATTENTION_FUNCTIONS[name] = compute


def _not_observed(model: PreTrainedModel) -> CompressError:
    return CompressError(
        "training.attention",
        f"the attention of {type(model).__name__} cannot be observed "
        f"(attention implementation {model.config.get_text_config()._attn_implementation})",
        fix="use sdpa attention, or an objective on logits or hidden states",
        exit_code=ExitCode.USAGE,
    )
