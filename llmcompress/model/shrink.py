"""Removes units of width groups from a block, rows and columns together; the result equals the masked block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.model.attributes import change_until, head_counts
from llmcompress.model.block_experiment import LINEARS
from llmcompress.model.map import BlockStructure, WidthGroup
from llmcompress.model.slices import Cut, Sliced, cut_structure, cuts


@torch.no_grad()
def shrink_block(
    block: nn.Module,
    structure: BlockStructure,
    keep: Mapping[int, Sequence[int]],
    *,
    run: Callable[[], Tensor] | None,
) -> BlockStructure:
    """Keep only these units of the width groups with these indices, in the order they have; other groups stay whole.

    `run` gives the block's output on a few tokens; it is compared with the same block whose removed units are masked.
    Where attention notes its number of heads, those integers are found by trying. Without `run` only channels can go.
    Returns the structure of the block as it is now; it is what a further call needs.

    Raises: CompressError when the smaller block does not compute the same; the block is then as it was. ValueError
    for groups or units that do not exist.
    """
    gone = cuts(structure, keep)
    if not gone:
        return structure
    _refuse_other_modules(block, gone)
    heads = [
        (structure.width_groups[index], len(set(units)))
        for index, units in keep.items()
        if kind_of(structure.width_groups[index]) == "heads"
    ]
    if run is None and heads:
        raise CompressError(
            "shrink.unverified",
            "attention heads cannot be removed without calibration data: the result is checked on a few tokens",
            fix="add `calibration` to the recipe",
        )
    masked = None if run is None else _masked(block, gone, run)
    sliced = Sliced()
    for name, cut in gone.items():
        sliced.cut(block.get_submodule(name), cut)
    if run is not None and masked is not None:
        _make_work(block, heads, run, masked, sliced)
    return cut_structure(structure, gone, keep)


@torch.no_grad()
def can_shrink(
    block: nn.Module, structure: BlockStructure, keep: Mapping[int, Sequence[int]], *, run: Callable[[], Tensor]
) -> bool:
    """Whether `shrink_block` can do that; the block is afterwards as it was."""
    before = [(vars(module), dict(vars(module)), dict(module._parameters)) for module in block.modules()]
    try:
        shrink_block(block, structure, keep, run=run)
    except CompressError:
        return False
    for attributes, old, parameters in before:
        attributes.update(old)
        attributes["_parameters"].update(parameters)
    return True


def kind_of(group: WidthGroup) -> Literal["channels", "heads"]:
    """Whether the units of a group are single channels of an FFN, or heads (KV groups) of several columns each."""
    return "channels" if group.has_single_columns else "heads"


def _make_work(
    block: nn.Module, heads: Sequence[tuple[WidthGroup, int]], run: Callable[[], Tensor], masked: Tensor, sliced: Sliced
) -> None:
    def works() -> bool:
        try:
            return same(run(), masked)
        except Exception:  # whatever a model raises about shapes that do not fit: the attempt failed
            return False

    if works():
        return
    candidates = head_counts(block, heads)
    if not heads or change_until(works, candidates) is None:
        sliced.restore()
        tried = ", ".join(sorted({attribute.name for attribute in candidates}))
        raise CompressError(
            "shrink.needs-all-heads" if heads else "shrink.not-separable",
            "the block cannot run without the units that should be removed",
            where=", ".join(sorted({part.site for group, _ in heads for part in group.parts})),
            fix="exclude attention from this pass: the number of heads is fixed elsewhere in the model"
            + (f" (changing {tried} does not help)" if tried else ""),
        )


def same(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: a wrong layout of heads moves a hidden state by far more than this."""
    exact = one.dtype in (torch.float32, torch.float64)
    near = 1e-4 if exact else 3e-2
    one, other = one.double(), other.double()
    # relative to the median: a few channels of a hidden state can be thousands of times larger than the others
    return one.shape == other.shape and bool(((one - other).abs() <= near * (other.abs() + other.abs().median())).all())


def _masked(block: nn.Module, gone: Mapping[str, Cut], run: Callable[[], Tensor]) -> Tensor:
    """The output with the removed units masked."""
    with ExitStack() as stack:
        for name, cut in gone.items():
            if cut.columns:
                stack.enter_context(_columns_hidden(block.get_submodule(name), cut.columns))
        return run().clone()


@contextmanager
def _columns_hidden(linear: nn.Module, columns: Sequence[int]) -> Iterator[None]:
    def hide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = torch.ones(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
        mask[list(columns)] = 0
        return (args[0] * mask, *args[1:])

    handle = linear.register_forward_pre_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def _refuse_other_modules(block: nn.Module, gone: Mapping[str, Cut]) -> None:
    other = [name for name in gone if not isinstance(block.get_submodule(name), LINEARS)]
    if other:
        kinds = sorted({type(block.get_submodule(name)).__name__ for name in other})
        raise CompressError(
            "shrink.compressed-site",
            f"rows and columns of a {' or '.join(kinds)} cannot be removed",
            where=", ".join(other),
            fix="put the structured pruning pass before the pass that replaces these linears",
        )
