"""SliceGPT with shortcuts, as in the paper: a separate basis after every addition, and a matrix on every skip
connection.

D = width of the stream, K = kept directions; in, out = of one skip connection.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.stream_moments import finite, first_of_stages
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.residual import Ports, Residual, refused
from llmcompress.model.residual_segments import ResidualSegments, last_norm_to_segment
from llmcompress.model.rotation import contract, few_tokens, make_rotatable
from llmcompress.model.shrink import same
from llmcompress.model.skeleton import BlockCall, find_blocks, put_module, record, recorders
from llmcompress.numerics.basis import SecondMoment
from llmcompress.passes.pruning.slicing import Slicing, lost_share, report_rows
from llmcompress.records.rows import SiteReport


def slice_with_shortcuts(whole: WholeModel, residual: Residual, slicing: Slicing) -> list[SiteReport]:
    """Block after block, each measured on what the sliced blocks before it give.

    The last block gives the whole stream again, so the head stays as wide as it was (as the paper's program does);
    except in families whose code asks for equal widths at both ends (GPT-2).
    """
    generator = whole.context.generator()
    make_rotatable(whole.model, residual, constants="bias", generator=generator)
    _check_lanes(whole, residual)
    moment = SecondMoment(residual.width, whole.context.device)
    blocks = find_blocks(whole.model)
    for ids_BT in torch.split(whole.context.windows_NT, whole.context.batch) if slicing.basis == "pca" else ():
        moment.add(record(whole.model, blocks, ids_BT).hidden.flatten(0, 1).to(whole.context.device))
    last_norm_to_segment(whole.model, residual)
    kept_DK = slicing.directions(moment.sum_DD, generator)
    for writer in residual.outside_blocks.writers:
        contract(whole.model, writer.port.parameter, writer.port.axis, kept_DK)
    lost: dict[str, float] = {}
    # what enters is narrow now: the first block must be able to read it before anything runs
    segments = _entered(whole, residual, 0, kept_DK)
    widens = _may_widen(whole.model, residual.width)
    for work in whole.stream():
        index, (name, ports) = work.info.index, residual.blocks[work.info.index]
        lost[f"{name}.{first_of_stages(ports)[0].name}"] = lost_share(moment.sum_DD, kept_DK)
        work.replace_module(segments.wrapper.to(whole.context.device))
        is_last = index + 1 == len(residual.blocks)
        kept_DK, moment = _slice_block(whole, work, segments, slicing, generator, lost, widen=widens and is_last)
        if not is_last:
            segments = _entered(whole, residual, index + 1, kept_DK)
        whole.context.progress.substep("slicegpt", done=index + 1, total=len(residual.blocks))
    removed = residual.width - slicing.width
    if widens:
        return report_rows(whole, residual, lost, removed=removed, removed_at_head=0)
    for port in residual.outside_blocks.readers():
        contract(whole.model, port.parameter, port.axis, kept_DK)
    lost[residual.outside_blocks.norms[0].name] = lost_share(moment.sum_DD, kept_DK)
    return report_rows(whole, residual, lost, removed=removed, removed_at_head=removed)


def _entered(whole: WholeModel, residual: Residual, index: int, enters_DK: Tensor) -> ResidualSegments:
    """The block put into segments, wherever it is; the stream enters it in that basis."""
    name, ports = residual.blocks[index]
    segments = ResidualSegments(whole.model.get_submodule(name), ports, residual.width)
    segments.narrow(0, enters_DK)
    put_module(whole.model, name, segments.wrapper)
    return segments


def _slice_block(
    whole: WholeModel,
    work: BlockWork,
    segments: ResidualSegments,
    slicing: Slicing,
    generator: torch.Generator,
    lost: dict[str, float],
    *,
    widen: bool,
) -> tuple[Tensor, SecondMoment]:
    """Choose the basis after every addition of a block; the last one, and the moment of what the block gives.

    With `widen` the block gives all directions, and nothing is measured after it.
    """
    width, name = len(segments.bases[-1]), work.info.name

    def directions(where: str, moment: SecondMoment) -> Tensor:
        finite({f"{name}.{where}": moment.sum_DD})
        return slicing.directions(moment.sum_DD, generator)

    for norm in first_of_stages(segments.ports)[1:]:
        moment = SecondMoment(width, whole.context.device)
        if slicing.basis == "pca":
            work.watch(segments.norm(norm), partial(_add_segment, moment, segments, norm.stage))
        kept_DK = directions(norm.name, moment)
        lost[f"{name}.{norm.name}"] = lost_share(moment.sum_DD, kept_DK)
        segments.narrow(norm.stage, kept_DK)
    moment = SecondMoment(width, whole.context.device)
    if widen:
        return segments.bases[-1], moment
    outputs = work.outputs()
    for hidden in outputs:
        moment.add(hidden.to(whole.context.device).flatten(0, -2))
    kept_DK = directions("output", moment)
    segments.narrow(segments.ports.stages, kept_DK)
    # the narrowed block gives exactly this, so it need not run again
    work.replace_module(segments.wrapper, [hidden @ kept_DK.to(hidden) for hidden in outputs])
    return kept_DK, moment


def _add_segment(moment: SecondMoment, segments: ResidualSegments, stage: int, inside: Tensor) -> None:
    moment.add(segments.segment(inside, stage).flatten(0, -2))


@torch.no_grad()
def _may_widen(model: PreTrainedModel, width: int) -> bool:
    """Whether the model's code lets the last block give a wider stream than the first one gets."""

    def widened(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = functional.pad(hidden, (0, width - hidden.shape[-1]))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with recorders(model, find_blocks(model)) as standing, ExitStack() as stack:
        stack.callback(standing[-1].register_forward_hook(widened).remove)
        with suppress(RuntimeError):  # shapes that do not fit
            model(input_ids=few_tokens(model), use_cache=False)
            return True
    return False


def _check_lanes(whole: WholeModel, residual: Residual) -> None:
    """Whether the blocks compute the same in segments, on a copy of one block of each kind.

    Raises: CompressError for blocks whose branches do not follow the width of what they add to: banks of experts.
    """
    recording = record(whole.model, find_blocks(whole.model), few_tokens(whole.model))
    checked: list[Ports] = []
    for (name, ports), call in zip(residual.blocks, recording.calls, strict=True):
        if any(ports is other for other in checked):
            continue
        checked.append(ports)
        block = whole.model.get_submodule(name)
        segments = ResidualSegments(copy.deepcopy(block), ports, residual.width)
        with suppress(RuntimeError, ValueError):  # shapes that do not fit
            if same(_output(segments.wrapper, call, recording.hidden), _output(block, call, recording.hidden)):
                continue
        raise refused("the block's output width follows its input width; try `form: global`", name)


@torch.no_grad()
def _output(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    return call.run(block, hidden.clone())
