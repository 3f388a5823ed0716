"""Finds by experiment on a live block what attention does with the rows of its linears. H = query heads, T = tokens.

Three experiments, in all of which the outputs of the linears are replaced, so that weights do not matter:

1. All values get one common signal. Attention outputs that are then equal belong to one query head.
2. One query head's output at the last token is differentiated: rows that matter only there are its queries, rows that
matter at earlier tokens too are its keys.
3. Keys are one-hot. The queries that then have a gradient are multiplied with that key row: a pair of rows with rotary
embeddings, one row without them, all of them behind a norm over the head.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.model.channel_tracing import Channels
from llmcompress.model.map import BlockStructure, Fold
from llmcompress.model.skeleton import BlockCall, find_blocks, record

_TOKENS = 4
"""Enough for a key before the last token; fewer than any sliding window."""


@dataclass(frozen=True)
class Atom:
    """Key rows and, per query head, the query rows that only meet each other in the scores; often one rotary pair."""

    keys: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadGroup:
    """Query heads that share their keys and values. Rows are numbers of channels (see `Attention.channels`)."""

    values: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    """Columns of the reader, one tuple per query head; column i is fed by value row i."""
    atoms: tuple[Atom, ...]
    """Each can go without the others; one alone where a norm lets every row meet every other."""


@dataclass(frozen=True)
class Attention:
    """One attention of a block: which linears give queries, keys and values, and which one reads the result."""

    taps: tuple[tuple[str, int], ...]
    reader: str
    groups: tuple[HeadGroup, ...]
    averages: bool
    """Whether every output is an average of values (weights that sum to one): then a value bias passes unchanged."""

    @property
    def channels(self) -> Channels:
        """The rows of the linears that share the attention's input, in one numbering."""
        return Channels(self.taps)

    def to_json(self) -> str:
        """As text, to be kept with a pass's decisions."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Attention:
        """What `to_json` wrote."""
        data = json.loads(text)
        groups = tuple(
            HeadGroup(
                _tuples(group["values"]),
                _tuples(group["heads"]),
                tuple(Atom(_tuples(atom["keys"]), _tuples(atom["queries"])) for atom in group["atoms"]),
            )
            for group in data["groups"]
        )
        return cls(_tuples(data["taps"]), data["reader"], groups, data["averages"])


def find_attentions(model: PreTrainedModel, index: int, structure: BlockStructure) -> list[Attention]:
    """The attentions of one block whose values reach a reader through a fold of the map; the model is not changed."""
    block = copy.deepcopy(find_blocks(model)[index][1]).float().requires_grad_(False)
    found = []
    for fold in structure.folds:
        group = next((group.sites for group in structure.groups if fold.producer in group.sites), ())
        if fold.producer_is_norm or len(fold.consumers) != 1 or not group:
            continue
        taps = tuple((name, structure.site(name).outputs) for name in group)
        experiment = _AttentionExperiment(model, index, block, Channels(taps), fold)
        if experiment.mixes_tokens():
            found.append(Attention(taps, fold.consumers[0], experiment.groups(), experiment.averages()))
    return found


class _SeenEnough(Exception):
    """Ends a forward once the reader's input is known."""


class _NotReached(Exception):
    """The reader was not run: an expert that no token goes to."""


class _AttentionExperiment:
    """A block whose projections put out what an experiment wants."""

    def __init__(self, model: PreTrainedModel, index: int, block: nn.Module, channels: Channels, fold: Fold) -> None:
        self.model, self.index, self.block, self.channels, self.fold = model, index, block, channels, fold
        self.generator = torch.Generator().manual_seed(0)
        start = channels.start(fold.producer)
        self.value_of_column = [start + row for row in fold.channel_map]
        self.values = sorted(set(self.value_of_column))
        self._calls: dict[int, tuple[BlockCall, Tensor]] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def mixes_tokens(self) -> bool:
        """Whether the reader sees, at the last token, what the first one put out."""
        rows = self.random(1, _TOKENS, self.channels.total).requires_grad_()
        with suppress(_NotReached):
            return bool(self._gradient(rows, lambda seen: seen[:, -1])[:, 0].any())
        return False

    def averages(self) -> bool:
        """Whether values that are all one give exactly that."""
        rows = self.random(1, _TOKENS, self.channels.total)
        rows[..., self.values] = 1.0
        return bool(torch.allclose(self._seen(rows), torch.ones(()), atol=1e-5))

    def groups(self) -> tuple[HeadGroup, ...]:
        """Query heads by their keys and values, each with its atoms."""
        heads = self._query_heads()
        queries, keys = self._rows_behind(heads)
        together: dict[tuple[frozenset[int], frozenset[int]], list[int]] = {}
        for head, columns in enumerate(heads):
            values = frozenset(self.value_of_column[column] for column in columns)
            together.setdefault((values, keys[head]), []).append(head)
        return tuple(
            HeadGroup(
                tuple(sorted(values)),
                tuple(tuple(sorted(heads[head], key=self.value_of_column.__getitem__)) for head in members),
                atoms,
            )
            for ((values, _), members), atoms in zip(
                together.items(),
                self._atoms([(sorted(k), [queries[h] for h in members]) for (_, k), members in together.items()]),
                strict=True,
            )
        )

    def _query_heads(self) -> list[list[int]]:
        """Columns of the reader that see the same average of the same signal."""
        rows = self.random(1, _TOKENS, self.channels.total)
        rows[..., self.values] = self.random(1, _TOKENS, 1)
        seen_CT = self._seen(rows)[0].T
        heads, left = [], torch.arange(len(seen_CT))
        while len(left):
            same = (seen_CT[left] - seen_CT[left[0]]).abs().amax(1) < 1e-5
            heads.append(left[same].tolist())
            left = left[~same]
        return heads

    def _rows_behind(self, heads: Sequence[Sequence[int]]) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
        """Query rows and key rows of every query head; one sequence of the batch per head."""
        rows = self.random(1, _TOKENS, self.channels.total).repeat(len(heads), 1, 1).requires_grad_()
        masks_HC = torch.zeros(len(heads), len(self.value_of_column))
        for head, columns in enumerate(heads):
            masks_HC[head, list(columns)] = 1
        moved_HTR = self._gradient(rows, lambda seen: seen[:, -1] * masks_HC) != 0
        earlier_HR, last_HR = moved_HTR[:, :-1].any(1), moved_HTR[:, -1]
        earlier_HR[:, self.values] = last_HR[:, self.values] = False
        keys = [frozenset(row.nonzero().flatten().tolist()) for row in earlier_HR]
        queries = [frozenset(row.nonzero().flatten().tolist()) for row in last_HR & ~earlier_HR]
        return queries, keys

    def _atoms(self, groups: Sequence[tuple[list[int], list[frozenset[int]]]]) -> list[tuple[Atom, ...]]:
        """Connected query and key rows of every group; key row number i of all groups stands in sequence i."""
        longest = max((len(keys) for keys, _ in groups), default=0)
        if not longest:
            return [() for _ in groups]
        rows = self.random(longest, _TOKENS, self.channels.total)
        signals = self.random(longest, _TOKENS)
        for keys, _ in groups:
            rows[..., keys] = 0.0
            for number, key in enumerate(keys):
                rows[number, :, key] = signals[number]
        moved_NR = (self._gradient(rows.requires_grad_(), lambda seen: seen[:, -1])[:, -1] != 0).tolist()
        found = []
        for keys, queries in groups:
            links = [
                (key, query)
                for number, key in enumerate(keys)
                for query in frozenset[int]().union(*queries)
                if moved_NR[number][query]
            ]
            parts = _components(links)
            found.append(
                tuple(
                    Atom(
                        tuple(sorted(part.intersection(keys))),
                        tuple(tuple(sorted(part & of_head)) for of_head in queries),
                    )
                    for part in parts
                )
            )
        return found

    @torch.enable_grad()
    def _gradient(self, rows: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        seen = part(self._seen(rows))
        (gradient,) = torch.autograd.grad((seen * self.random(*seen.shape)).sum(), rows)
        return gradient

    def _seen(self, rows_BTR: Tensor) -> Tensor:
        """What the reader reads when the projections put out these rows."""
        call, hidden = self._call(len(rows_BTR))
        with ExitStack() as stack:
            widths = [width for _, width in self.channels.taps]
            for (name, _), piece in zip(self.channels.taps, torch.split(rows_BTR, widths, dim=-1), strict=True):
                stack.enter_context(_gives(self.block.get_submodule(name), piece))
            seen = stack.enter_context(_reads(self.block.get_submodule(self.fold.consumers[0])))
            with suppress(_SeenEnough):
                call.run(self.block, hidden)
        if not seen:
            raise _NotReached
        return seen[0]

    def _call(self, batch: int) -> tuple[BlockCall, Tensor]:
        if batch not in self._calls:
            ids = torch.ones(batch, _TOKENS, dtype=torch.int64)
            recording = record(self.model, find_blocks(self.model), ids)
            call = recording.calls[self.index].with_tensors(_as_float32)
            self._calls[batch] = call, recording.hidden.float()
        return self._calls[batch]


def _components(links: Sequence[tuple[int, int]]) -> list[frozenset[int]]:
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in links:
        parent[root(one)] = root(other)
    members: dict[int, list[int]] = {}
    for node in sorted(parent):
        members.setdefault(root(node), []).append(node)
    return [frozenset(nodes) for nodes in members.values()]


@contextmanager
def _gives(module: nn.Module, output: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, ___: output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _reads(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _SeenEnough

    handle = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
