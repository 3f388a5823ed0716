"""Folds of one block: candidates from proportional channels, kept if folding random factors changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from llmcompress.model.block_experiment import BlockExperiment, Observed, sizes
from llmcompress.model.channel_tracing import NONE, Channels, Link, trace_channels
from llmcompress.model.map import Fold
from llmcompress.model.surgery import apply_fold


def norm_folds(experiment: BlockExperiment, readers: Sequence[Sequence[str]]) -> list[Fold]:
    """Candidates whose producer is a norm; `readers` are the linears of the block, grouped by shared input."""
    found = []
    for name, norm in experiment.norms.items():
        offset = _gain_offset(norm, experiment.base, name)
        if offset is None:
            continue
        channels = Channels(((name, norm.get_parameter("weight").numel()),))
        links = trace_channels(experiment, channels, [group[0] for group in readers])
        found += _candidates(channels, links, readers, offset, is_norm=True)
    return found


def linear_folds(channels: Channels, links: Sequence[Link], readers: Sequence[Sequence[str]]) -> list[Fold]:
    """Candidates whose producer is a linear (or some rows of one): v → o, up → down, fc1 → ReLU → fc2."""
    return _candidates(channels, links, readers, 0.0, is_norm=False)


def legal(experiment: BlockExperiment, folds: Sequence[Fold], *, seed: int = 0) -> bool:
    """Whether the block computes the same after random factors go into all these folds: powers of two, then any.

    float32 throughout: right folds differ by about 1e-6 of the block's change to the hidden state, wrong ones by
    about 1.
    """
    before = experiment.base.output
    # a block may give another width than it gets: the last one of a model with a basis per block
    change = before - experiment.hidden if before.shape == experiment.hidden.shape else before
    scale = change.square().mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    exponents = [torch.rand(_producer_width(experiment, fold), generator=generator) * 4 - 2 for fold in folds]
    touched = {
        name: experiment.block.get_submodule(name) for fold in folds for name in (fold.producer, *fold.consumers)
    }
    for whole in (True, False):
        saved = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in touched.items()}
        for fold, exponent in zip(folds, exponents, strict=True):
            apply_fold(experiment.block, fold, _only_read(fold, 2.0 ** (exponent.round() if whole else exponent)))
        after = experiment.run().output
        for name, module in touched.items():
            module.load_state_dict(saved[name])
        if not (after - before).abs().max() <= 1e-4 * scale:
            return False
    return True


def _candidates(
    channels: Channels, links: Iterable[Link], readers: Sequence[Sequence[str]], offset: float, *, is_norm: bool
) -> list[Fold]:
    """One fold per producing tap: all its readers together, if they agree on which channel feeds which."""
    members = {group[0]: group for group in readers}
    by_producer: dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
    for link in links:
        if NONE in link.proportional:
            continue
        places = [channels.locate(channel) for channel in link.proportional]
        producers = {tap for tap, _ in places}
        if len(producers) == 1:
            mapped = tuple(channel for _, channel in places)
            by_producer.setdefault(producers.pop(), []).append((tuple(members[link.reader]), mapped))
    folds = []
    for producer, reads in by_producer.items():
        if len({mapped for _, mapped in reads}) == 1:
            consumers = tuple(name for names, _ in reads for name in names)
            folds.append(Fold(producer, is_norm, consumers, reads[0][1], offset))
    return folds


def _gain_offset(norm: nn.Module, base: Observed, name: str) -> float | None:
    """0 for a norm whose gain is its weight, 1 where the gain is 1 + weight, None for neither or an unused norm."""
    if name not in base.calls:
        return None
    args, kwargs = base.calls[name]
    before = norm(*args, **kwargs)
    for offset in (0.0, 1.0):
        saved = {k: v.clone() for k, v in norm.state_dict().items()}
        for key, parameter in norm.named_parameters():
            add = offset if key == "weight" else 0.0
            parameter.data = (parameter.data + add) * 2 - add
        after = norm(*args, **kwargs)
        norm.load_state_dict(saved)
        if torch.allclose(after, 2 * before, rtol=1e-4, atol=1e-5):
            return offset
    return None


def _producer_width(experiment: BlockExperiment, fold: Fold) -> int:
    producer = experiment.block.get_submodule(fold.producer)
    return producer.get_parameter("weight").numel() if fold.producer_is_norm else sizes(producer)[0]


def _only_read(fold: Fold, factors: Tensor) -> Tensor:
    """1 for channels that no consumer reads (the q and k rows of a fused projection)."""
    kept = torch.ones_like(factors)
    columns = torch.tensor(fold.channel_map)
    kept[columns] = factors[columns]
    return kept
