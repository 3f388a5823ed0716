"""Runs the experiments on the residual stream of a live model, with random weights and one block of each kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.model.embedding_norm import bake_embedding_norm
from llmcompress.model.probe import without_weights
from llmcompress.model.random_weights import materialise, release
from llmcompress.model.residual import NotReached, Ports, Residual, StreamExperiment, find_ports, refused
from llmcompress.model.skeleton import BlockCall, find_blocks, record, recorders

_SEQUENCES, _LENGTH = (4, 16, 64), 32
"""Tokens of an experiment; more where not every expert of a layer was reached by so many."""
_VOCABULARY = 8
"""Entries of the embedding and the head that stand in for the real ones."""

Blocks = Sequence[tuple[str, nn.Module]]


def find_residual(model: PreTrainedModel) -> Residual:
    """Who reads and writes the residual stream of a live model; its weights are neither read nor changed.

    Raises: CompressError, naming the module, where a change of basis could not be exact.
    """
    shell = _shell(model)
    missing = ""
    for sequences in _SEQUENCES:
        try:
            return _find(shell, torch.arange(sequences * _LENGTH).reshape(sequences, _LENGTH) % (_VOCABULARY - 3) + 3)
        except NotReached as error:
            missing = str(error)
    raise refused("this parameter is not used", missing)


def check_residual(config: PretrainedConfig) -> None:
    """That the residual stream of models with this config can be given another basis; no weights are needed.

    Raises: CompressError as `find_residual` does.
    """
    shell = _shell(without_weights(config))
    materialise(find_blocks(shell)[0][1])
    with torch.no_grad():
        bake_embedding_norm(shell)
    find_residual(shell)


def _find(shell: PreTrainedModel, ids_BT: Tensor) -> Residual:
    blocks = find_blocks(shell)
    materialise(blocks[0][1])  # a recorder runs it once, to learn what blocks return
    recording = record(shell, blocks, ids_BT)
    width = recording.hidden.shape[-1]
    kinds: dict[object, Ports] = {}
    found = []
    for (name, block), call in zip(blocks, recording.calls, strict=True):
        kind = _kind(block)
        if kind not in kinds:
            materialise(block)
            kinds[kind] = find_ports(_block_experiment(name, block, call, recording.hidden.shape), width)
        release(block)
        found.append((name, kinds[kind]))
    materialise(blocks[0][1])
    residual = Residual(width, _outside_blocks(shell, blocks, ids_BT, width), tuple(found))
    if len({norm.form.centred for ports in (residual.outside_blocks, *kinds.values()) for norm in ports.norms}) > 1:
        raise refused("some norms subtract the mean and others do not", residual.outside_blocks.norms[0].name)
    return residual


def _shell(model: PreTrainedModel) -> PreTrainedModel:
    """A copy: random weights outside the blocks, a small embedding and head, and blocks on the meta device."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    shell = copy.deepcopy(model, memo).eval()
    embedding, head = shell.get_input_embeddings(), shell.get_output_embeddings()
    width = embedding.weight.shape[1]
    small = nn.Embedding(_VOCABULARY, width, device="meta")
    shell.set_input_embeddings(small)
    if head is not None:
        bias = getattr(head, "bias", None) is not None
        shell.set_output_embeddings(nn.Linear(head.weight.shape[1], _VOCABULARY, bias=bias, device="meta"))
    materialise(shell, skip=[block for _, block in find_blocks(shell)])
    return shell


def _block_experiment(name: str, block: nn.Module, call: BlockCall, shape: torch.Size) -> StreamExperiment:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator) for _ in range(2)]

    def run(sample: int) -> tuple[Tensor, Tensor]:
        return samples[sample], call.run(block, samples[sample].clone())

    return StreamExperiment(name, block, run, written=1)


def _outside_blocks(shell: PreTrainedModel, blocks: Blocks, ids_BT: Tensor, width: int) -> Ports:
    with recorders(shell, blocks) as standing:

        def run(sample: int) -> tuple[Tensor, Tensor]:
            logits = shell(input_ids=ids_BT.roll(sample, 1), use_cache=False).logits
            hidden = standing[0].hidden
            assert hidden is not None
            return hidden, logits

        run(0)
        ports = find_ports(StreamExperiment("", shell, run, written=0), width)
    if len(ports.norms) != 1:
        raise refused("there is not exactly one norm between the last block and the output head", type(shell).__name__)
    return ports


def _kind(block: nn.Module) -> object:
    """Blocks with the same modules and shapes are of one kind."""
    return tuple(
        (name, type(owner), tuple((key, p.shape) for key, p in owner.named_parameters(recurse=False)))
        for name, owner in block.named_modules()
    )
