"""The sequential calibrator: one block at a time on the device, each with its own arguments. T = tokens.

The only file that moves tensors between devices or decides in which dtype a block computes (float32 unless asked:
bfloat16 is several times slower on processors without its instructions, and every statistic is float32 anyway).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.experts import all_tokens, in_expert
from llmcompress.calibration.input_hooks import LastInput, ending_early, observed_input
from llmcompress.errors import CompressError
from llmcompress.model.map import BlockInfo, Fold, ModelMap
from llmcompress.model.shrink import shrink_block
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import BlockCall, find_blocks, record
from llmcompress.model.surgery import apply_fold
from llmcompress.numerics.statistics import Statistic

_ALL = slice(None)

Work = TypeVar("Work", bound="BlockWork")


class BlockWork:
    """One block during compression: its sites, folds and statistics."""

    def __init__(
        self,
        info: BlockInfo,
        module: nn.Module,
        inputs: Sequence[Tensor],
        calls: Sequence[BlockCall],
        context: RunContext,
    ) -> None:
        self.info, self.module, self.context = info, module, context
        self._inputs, self._calls = inputs, calls
        self.decisions: Mapping[str, Tensor] = {}
        """What the first pass of the stage decided about the whole model."""
        self.dense_inputs: list[Tensor] = []
        """What the block was given when all blocks were as the stage found them, on the CPU; for passes that ask."""
        self.dense_outputs: list[Tensor] = []
        """What it then gave."""
        self._known_outputs: list[Tensor] | None = None
        self._name_sites()

    def copy(self, kind: type[Work], context: RunContext) -> Work:
        """The block as it is now with tensors of its own and the same inputs, to try something on; unmeasured."""
        # buffers are cloned one by one: a copy of the storage behind them would take what they share with others along
        cloned = {id(buffer): buffer.clone() for buffer in self.module.buffers()}
        found = kind(self.info, copy.deepcopy(self.module, cloned), self._inputs, self._calls, context)
        found.dense_inputs, found.dense_outputs = self.dense_inputs, self.dense_outputs
        return found

    def folds_into(self, sites: Sequence[LinearSite]) -> list[Fold]:
        """Folds all of whose consumers are among `sites`, and which touch nothing that is compressed already."""
        dense = {site.info.name for site in sites if not site.is_compressed}
        compressed = {site.info.name for site in self.sites if site.is_compressed}
        return [
            fold
            for fold in self.info.structure.folds
            if dense.issuperset(fold.consumers) and fold.producer not in compressed
        ]

    def site(self, relative: str) -> LinearSite:
        """The site of that name (relative to the block)."""
        return self._by_name[relative]

    def input_groups(self) -> list[list[LinearSite]]:
        """Sites that share an input, group by group, in order of execution."""
        return [[self._by_name[name] for name in group.sites] for group in self.info.structure.groups]

    def producer_channels(self, fold: Fold) -> int:
        """The number of output channels of a fold's producer."""
        if fold.producer_is_norm:
            return self.module.get_parameter(f"{fold.producer}.weight").numel()
        return self.info.structure.site(fold.producer).outputs

    def fold(self, fold: Fold, divide_P: Tensor) -> None:
        """Divide the producer's channels and multiply the consumers' columns."""
        apply_fold(self.module, fold, divide_P, storage_dtype=self.context.storage_dtype)

    def shrink(self, keep: Mapping[int, Sequence[int]]) -> None:
        """Keep only these units of the width groups with these indices; the block then has other `sites`, unmeasured.

        Checked on a few tokens: the narrower block computes what the wide one does with those units masked.
        Raises: CompressError when it cannot; the block is then as it was.
        """
        run = self._few_tokens if self._inputs else None
        structure = shrink_block(self.module, self.info.structure, keep, run=run)
        self.info = replace(self.info, structure=structure)
        self._name_sites()

    def _name_sites(self) -> None:
        self._by_name = {
            site.name: LinearSite(
                self.info.full(site.name),
                site,
                self.module,
                self.context.storage_dtype,
                zeros_are_masks=self.context.zeros_are_masks,
            )
            for site in self.info.structure.sites
        }
        self.sites = tuple(self._by_name.values())

    @torch.no_grad()
    def _few_tokens(self) -> Tensor:
        """The output for the first sequence of the first batch; for the whole batch where its axis cannot be told."""
        cut = _windows_of(self._inputs[0], self._calls[0], slice(1))
        return self._run_in(self.module, *(cut or (self._inputs[0], self._calls[0])), mixed=False)

    @torch.no_grad()
    def measure(self, sites: Sequence[LinearSite], kinds: Sequence[type[Statistic]]) -> None:
        """One forward over all calibration data; every input group of `sites` shares one statistic of each kind.

        What follows the last of these inputs is not computed.

        Raises: CompressError when an input is not finite, naming the site.
        """
        wanted = {site.name for site in sites}
        measured: list[tuple[list[LinearSite], dict[type[Statistic], Statistic]]] = []
        with ExitStack() as hooks:
            every = hooks.enter_context(all_tokens(self.module)) if self.context.experts == "all" else None
            for group in self.input_groups():
                members = [site for site in group if site.name in wanted]
                if members:
                    width = members[0].info.inputs
                    statistics = {kind: kind(width, self._device) for kind in kinds}
                    only = every if in_expert(members[0].name) else None
                    hooks.enter_context(observed_input(members[0].module, list(statistics.values()), only))
                    measured.append((members, statistics))
            forward = hooks.enter_context(ending_early([members[0] for members, _ in measured]))
            for inputs, call in zip(self._inputs, self._calls, strict=True):
                with forward.of(inputs):
                    self._run(inputs, call)
        for members, statistics in measured:
            for statistic in statistics.values():
                if self.context.processes.count > 1:
                    if not statistic.adds_up:
                        self.context.processes.require_one(f"a pass that reads `{type(statistic).__name__}`")
                    statistic.pool(self.context.processes)
                if not statistic.is_finite():
                    raise CompressError(
                        "numerics.not-finite",
                        "the model computes NaN or Inf on the calibration data",
                        where=f"input of {members[0].name}",
                        fix="check the checkpoint with a plain forward pass; try another calibration text",
                        saved=f"blocks before {self.info.index} are saved: run again to resume",
                    )
            for site in members:
                site.set_statistics(statistics)

    def forget(self) -> None:
        """Drop the statistics: the next pass measures the block as it is then."""
        for site in self.sites:
            site.set_statistics({})

    def round_to_storage_dtype(self) -> None:
        """Round the block's parameters to what will be stored, so that later blocks see what users will load.

        Buffers stay: loaders keep rotary tables in float32, and the scales of quantized linears are rounded already.
        """
        for parameter in self.module.parameters():
            parameter.data.copy_(parameter.data.to(self.context.storage_dtype))

    @torch.no_grad()
    def watch(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Show every input of one of the block's modules; the block runs over all data, each time only that far."""
        self.context.processes.require_one("a pass of this recipe")

        def show(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])

        with ExitStack() as stack:
            stack.callback(module.register_forward_pre_hook(show).remove)
            stack.enter_context(_ends_at(module))
            for inputs, call in zip(self._inputs, self._calls, strict=True):
                with suppress(_SeenEnough):
                    self._run(inputs, call)

    @torch.no_grad()
    def side_by_side(self, site: LinearSite, dense: nn.Module, see: Callable[[Tensor, Tensor], None]) -> None:
        """Show a site's input, T×I in float32, batch by batch: in the dense model, and as it is now.

        `dense` is the block as it was before anybody worked on it; both run only that far.
        """
        for inputs, dense_inputs, call in zip(self._inputs, self.dense_inputs, self._calls, strict=True):
            found = [LastInput(), LastInput()]
            for module, hidden, into in ((dense, dense_inputs, found[0]), (self.module, inputs, found[1])):
                linear = module.get_submodule(site.info.name)
                with observed_input(linear, [into]), _ends_at(linear), suppress(_SeenEnough):
                    self._run_in(module, hidden, call)
            see(found[0].x_TI, found[1].x_TI)

    def replace_module(self, module: nn.Module, outputs: list[Tensor] | None = None) -> None:
        """Another module takes the block's place; `outputs`, where they are known, are fed onward as they are."""
        self.module, self._known_outputs = module, outputs

    def inputs(self) -> list[Tensor]:
        """The block's input for every batch, on the CPU; not to be changed."""
        self.context.processes.require_one("a pass of this recipe")
        return list(self._inputs)

    @property
    def batches(self) -> int:
        """How many batches this process has."""
        return len(self._inputs)

    def pool_(self, tensor: Tensor) -> None:
        """Make it the sum of what all processes have."""
        self.context.processes.all_reduce_sum_(tensor)

    def output(self, batch: int, windows: slice = _ALL) -> Tensor:
        """The block's output for one of this process's batches, or some of its windows, on its device.

        With gradients where enabled. Where a batch's axis cannot be told, all of it is computed.
        """
        hidden, call = self._inputs[batch], self._calls[batch]
        cut = None if windows == _ALL else _windows_of(hidden, call, windows)
        return self._run(hidden, call)[windows] if cut is None else self._run(*cut)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The block's output for every batch, on the CPU."""
        if self._known_outputs is not None:
            return self._known_outputs
        return self.outputs_for(self._inputs)

    @torch.no_grad()
    def outputs_for(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same for other inputs of the same batches."""
        return [self._run(hidden, call).cpu() for hidden, call in zip(inputs, self._calls, strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _run(self, inputs: Tensor, call: BlockCall) -> Tensor:
        return self._run_in(self.module, inputs, call)

    def _run_in(self, module: nn.Module, inputs: Tensor, call: BlockCall, *, mixed: bool = True) -> Tensor:
        """`mixed`: in bfloat16 where the context says so; otherwise two outputs can be compared."""
        there, device = call.with_tensors(lambda tensor: tensor.to(self._device)), self._device
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed and self.context.mixed_precision == "bf16"):
            return there.run(module, inputs.to(device)).float()


def _windows_of(hidden_BTD: Tensor, call: BlockCall, windows: slice) -> tuple[Tensor, BlockCall] | None:
    """Some windows of a batch, with what belongs to them; None where the arguments do not say which axis is theirs."""
    batch, tokens, _ = hidden_BTD.shape
    rows: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        rows.extend(tensor.shape[:1])
        return tensor

    call.with_tensors(note)
    # Bloom and Falcon hand their blocks biases of batch · heads rows
    if batch == tokens or not all(count <= batch or count % batch for count in rows):
        return None
    return hidden_BTD[windows], call.with_tensors(
        lambda tensor: tensor[windows] if tensor.shape[:1] == (batch,) else tensor
    )


class _SeenEnough(Exception):
    """Ends a forward early; private, so it can hide no error of the model's."""


@contextmanager
def _ends_at(module: nn.Module) -> Iterator[None]:
    """Forwards end when they reach the module; hooks that stand there already see its input."""

    def end(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _SeenEnough

    handle = module.register_forward_pre_hook(end)
    try:
        yield
    finally:
        handle.remove()


class BlockStream:
    """Runs the model block by block over calibration windows; later blocks see the outputs of compressed earlier ones.

    `windows_NT` are unpadded token ids, so no mask is needed to keep padding out of the statistics. Without windows the
    blocks are only visited, which is enough for passes without data. With `dense` a second stream runs through the
    uncompressed blocks.
    """

    def __init__(
        self, model: PreTrainedModel, model_map: ModelMap, context: RunContext, *, dense: bool = False
    ) -> None:
        self._map, self._context, self._dense = model_map, context, dense
        named = find_blocks(model)
        self._blocks = [block for _, block in named]
        self._hidden: list[Tensor] = []
        self._calls: list[list[BlockCall]] = []
        with context.weights_at.running(model, torch.device("cpu")):
            windows_NT = context.processes.shard(context.windows_NT)
            for ids_BT in torch.split(windows_NT, context.batch) if len(windows_NT) else ():
                recording = record(model, named, ids_BT)
                first = self._calls[0] if self._calls else recording.calls
                self._hidden.append(recording.hidden)
                self._calls.append(
                    [sharing_tensors(call, same) for call, same in zip(recording.calls, first, strict=True)]
                )

    def __iter__(self) -> Iterator[BlockWork]:
        """Yield every block, on the device and in float32; when the caller is done with it, feed its outputs onward."""
        dense = self._hidden
        for info, module in zip(self._map.blocks, self._blocks, strict=True):
            module.to(self._context.device, torch.float32)
            calls = [batch_calls[info.index] for batch_calls in self._calls]
            work = BlockWork(info, module, self._hidden, calls, self._context)
            if self._dense:
                work.dense_inputs, dense = dense, work.outputs_for(dense)
                work.dense_outputs = dense
            yield work
            if info.index + 1 < len(self._blocks):
                self._hidden = work.outputs()
            self._context.weights_at.leave(info.name, work.module)


def sharing_tensors(call: BlockCall, first: BlockCall) -> BlockCall:
    """The same call with the first batch's tensors wherever they are equal: masks and rotary tables are kept once."""
    known: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        known.append(tensor)
        return tensor

    first.with_tensors(note)
    return call.with_tensors(lambda tensor: next((same for same in known if _equal(same, tensor)), tensor))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
