"""Removes query, key and value rows of one attention, whose code keeps its shapes. O = outputs, I = inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.attention import Attention, HeadGroup
from llmcompress.modules.selected import SelectedColumns, SelectedRows
from llmcompress.numerics.low_rank import best_left, relative_output_error
from llmcompress.numerics.modular import coupling, row_energy, value_basis
from llmcompress.numerics.statistics import Gram, Moments
from llmcompress.records.rows import SiteReport


def shrink_attention(
    block: BlockWork, attention: Attention, *, score_rows: int | None, value_rows: int | None
) -> list[SiteReport]:
    """Keep so many key rows and value rows of every head (None: all), with all that belongs to them.

    The block must be measured: `Gram` and `Moments` of the attention's input and of what its reader reads.
    """
    work = _Work(block, attention)
    if score_rows is not None:
        work.choose_scores(score_rows)
    if value_rows is not None:
        work.turn_values(value_rows)
    return list(work.finish())


class _Work:
    """New weights and the removed rows, until `finish` installs the smaller linears."""

    def __init__(self, block: BlockWork, attention: Attention) -> None:
        self.attention, self.channels = attention, attention.channels
        self.taps = {name: block.site(name) for name, _ in attention.taps}
        self.reader = block.site(attention.reader)
        self.weights = {name: site.weight_OI for name, site in self.taps.items()}
        self.biases = {name: site.bias_O for name, site in self.taps.items()}
        self.gone: defaultdict[str, set[int]] = defaultdict(set)
        self.read: tuple[Tensor, Tensor | None, list[int], SiteReport] | None = None

    def choose_scores(self, rows: int) -> None:
        """Query and key rows that add least to the scores go, head by head."""
        energies = torch.cat([self._energy(name) for name, _ in self.attention.taps])
        for group in self.attention.groups:
            scores = []
            for atom in group.atoms:
                queries_H = torch.stack([energies[list(head)].sum() for head in atom.queries])
                scores.append(float(coupling(queries_H, energies[list(atom.keys)].sum())) / len(atom.keys))
            left = rows
            for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
                atom = group.atoms[number]
                if len(atom.keys) <= left:
                    left -= len(atom.keys)
                    continue
                for row in (*atom.keys, *(row for head in atom.queries for row in head)):
                    self._drop(row)

    def turn_values(self, rank: int) -> None:
        """Values of every head in the directions that the reader needs most; the reader is fitted to what is left."""
        gram, weight_OI = self.reader.statistic(Gram), self.reader.weight_OI
        bias_I = self._value_bias()
        gram_II = _without(bias_I, gram.sum_II.double(), self.reader.statistic(Moments).mean_I, gram.tokens)
        bases = [self._basis(group, gram_II, weight_OI, rank) for group in self.attention.groups]
        columns = [column for group in self.attention.groups for head in group.heads for column in head[:rank]]
        mixing_KI = torch.zeros(len(columns), weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)
        row = 0
        for group, basis_KV in zip(self.attention.groups, bases, strict=True):
            self._turn(group, basis_KV)
            for head in group.heads:
                mixing_KI[row : row + rank, list(head)] = basis_KV
                row += rank
        new_OK = best_left(weight_OI, mixing_KI, gram_II)
        bias_O = self.reader.bias_O
        if bias_I is not None:
            moved_O = (weight_OI.double() @ bias_I).float()
            bias_O = moved_O if bias_O is None else bias_O + moved_O
        error = relative_output_error(weight_OI.double(), new_OK.double() @ mixing_KI, gram_II)
        row_ = SiteReport(
            site=self.reader.name,
            algorithm="modegpt",
            rank=rank,
            error=error,
            tokens=gram.tokens,
            parameters=new_OK.numel() + (0 if bias_O is None else len(bias_O)),
            removed=weight_OI.shape[1] - len(columns),
        )
        self.read = (new_OK, bias_O, columns, row_)

    def finish(self) -> Iterator[SiteReport]:
        """Put the smaller linears in place; one row for each."""
        for name, site in self.taps.items():
            gone = self.gone[name]
            if not gone:
                self._write(name)
                continue
            rows = [row for row in range(site.info.outputs) if row not in gone]
            bias = self.biases[name]
            weight_KI, bias_K = self.weights[name][rows], None if bias is None else bias[rows]
            if bias_K is not None and not bool(bias_K.any()):
                bias_K = None
            site.replace(SelectedRows.from_rows(weight_KI, bias_K, rows=rows, outputs=site.info.outputs))
            yield SiteReport(
                site=site.name,
                algorithm="modegpt",
                tokens=site.statistic(Gram).tokens,
                parameters=weight_KI.numel() + (0 if bias_K is None else len(bias_K)),
                removed=len(gone),
            )
        if self.read is not None:
            new_OK, bias_O, columns, row = self.read
            self.reader.replace(
                SelectedColumns.from_columns(new_OK, bias_O, columns=columns, inputs=self.reader.info.inputs)
            )
            yield row

    def _write(self, name: str) -> None:
        """A linear that keeps all its rows stays what it is, with the values turned that it gives."""
        site, bias = self.taps[name], self.biases[name]
        site.write(self.weights[name])
        if bias is not None:
            site.write_bias(bias)

    def _energy(self, name: str) -> Tensor:
        site = self.taps[name]
        gram, mean_I = site.statistic(Gram), site.statistic(Moments).mean_I
        return row_energy(self.weights[name], self.biases[name], gram.sum_II, mean_I, gram.tokens)

    def _value_bias(self) -> Tensor | None:
        """What value biases add to every input of the reader; they are taken from where they stand."""
        values: list[int] = []
        readers: list[int] = []
        for group in self.attention.groups:
            values += group.values * len(group.heads)
            readers += [column for head in group.heads for column in head]
        name = self.channels.locate(values[0])[0]
        bias = self.biases[name]
        if bias is None:
            return None
        rows = [self.channels.locate(row)[1] for row in values]
        moved_I = torch.zeros(self.reader.info.inputs, dtype=torch.float64, device=bias.device)
        moved_I[readers] = bias[rows].double()
        bias[rows] = 0.0
        return moved_I

    def _basis(self, group: HeadGroup, gram_II: Tensor, weight_OI: Tensor, rank: int) -> Tensor:
        readers = [weight_OI[:, list(head)] for head in group.heads]
        grams = [gram_II[list(head)][:, list(head)] for head in group.heads]
        return value_basis(readers, grams, rank)

    def _turn(self, group: HeadGroup, basis_KV: Tensor) -> None:
        """The first value rows become the directions of the basis, the others go."""
        name = self.channels.locate(group.values[0])[0]
        rows = [self.channels.locate(row)[1] for row in group.values]
        weight_OI, rank = self.weights[name], len(basis_KV)
        turned_KI = (basis_KV @ weight_OI[rows].double()).to(weight_OI.dtype)
        weight_OI[rows[:rank]] = turned_KI
        for row in group.values[rank:]:
            self._drop(row)

    def _drop(self, row: int) -> None:
        name, index = self.channels.locate(row)
        self.gone[name].add(index)


def _without(bias_I: Tensor | None, gram_II: Tensor, mean_I: Tensor, tokens: int) -> Tensor:
    """The Gram matrix of x - b."""
    if bias_I is None:
        return gram_II
    cross_II = tokens * torch.outer(bias_I, mean_I.double())
    return gram_II - cross_II - cross_II.T + tokens * torch.outer(bias_I, bias_I)
