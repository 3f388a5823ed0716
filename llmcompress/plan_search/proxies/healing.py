"""Block-local healing: every block of a candidate learns what the dense block gave, before the candidate is judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.trainable_roles import ROLES, Role, TrainableRoles
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.quantization.block_training import BlockTraining, Group, Steps, trained
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.training.trainable_form import norm_weights, trainable_form

_TRAINED: dict[str, frozenset[Role]] = {"norms_and_scales": frozenset({"scales"}), "weights": ROLES}


class HealingSettings(BaseModel):
    """How candidates are healed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: Literal["norms_and_scales", "weights"] = "norms_and_scales"
    """norms_and_scales: norm weights, biases, and the scales of quantized weights, whose codes stay; weights: all
    weights too, factors and codes among them."""
    steps: int = Field(default=16, ge=1)
    """Optimizer steps per block."""
    windows: int = Field(default=2, ge=1)
    """Windows per step."""
    rate: float = Field(default=0.01, gt=0, le=1)
    """Learning rate, as a share of the mean magnitude of what is trained."""


class Healing:
    """Heals candidates of one space on the calibration windows of the run: never on the text that they are judged on.

    A block reads what the healed blocks before it give, and is to give what the dense block at its place gave: so the
    block behind a dropped one learns to compensate for it. The numbers with which a block erred least on windows kept
    apart stay, the start among them, so no block becomes worse there. Targets are the outputs of all dense blocks,
    computed once, from a copy of the model, and kept in memory: blocks × windows × tokens × hidden size numbers.

    Source: the block-wise targets are those of Chen et al., arXiv 2407.11062 (EfficientQAT), section 3.2.
    """

    def __init__(self, whole: WholeModel, space: PlanSpace, settings: HealingSettings) -> None:
        context = replace(whole.context, keep=None, state=None)
        self._whole, self._space, self._settings = whole.within(context), space, settings
        self._targets: dict[str, list[list[Tensor]]] = {}

    @property
    def fingerprint(self) -> str:
        """The settings; the text is that of the levels."""
        return f"healed: {self._settings.model_dump_json()}"

    def __call__(self, plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
        """Heal in place."""
        targets = self._dense_outputs(plan)
        kept = [index for index in range(len(targets)) if index not in self._space.dropped(plan)]
        sparse = self._leaves_zeros(plan)
        healed = WholeModel(model, _remaining(self._whole.map, kept), self._whole.context)
        with torch.enable_grad():
            for block in healed.stream():
                block.dense_outputs = targets[kept[block.info.index]]
                self._heal(block, keep_zeros=sparse)
                block.round_to_storage_dtype()
        return model

    def _heal(self, block: BlockWork, *, keep_zeros: bool) -> None:
        settings = self._settings
        context = block.context
        wanted = TrainableRoles(_TRAINED[settings.train], keep_zeros=keep_zeros, storage_dtype=context.storage_dtype)
        dense = [each for each in block.module.parameters() if each.dim() > 1]
        with trainable_form(block.module, wanted, only=lambda name: _has_form(block.module, name)) as found:
            learned = [*norm_weights(block.module), *(each for role in found.values() for each in role)]
            if settings.train == "weights":
                inside = {id(each) for each in block.module.parameters()}
                learned += [each for each in dense if id(each) in inside]
            learned = list(dict.fromkeys(learned))
            pruned = [(each, each == 0) for each in learned if keep_zeros and each.dim() > 1]
            groups = [Group([each], settings.rate * _magnitude(each)) for each in learned]
            training = BlockTraining(block, windows=settings.windows)
            steps = Steps("healing", settings.steps, after=lambda: _restore_zeros(pruned))
            if groups:
                trained(training, groups, steps, error=training.error)

    @torch.no_grad()
    def _dense_outputs(self, plan: Plan) -> list[list[Tensor]]:
        """Of every dense block, batch by batch: after what the plan does to the whole model first, which may turn the
        hidden state."""
        unit, choice = next((u, c) for u, c in zip(self._space.units, plan, strict=True) if u.kind == "before")
        name = unit.options[choice]
        if name not in self._targets:
            whole = WholeModel(copy.deepcopy(self._whole.model), self._whole.map, self._whole.context)
            passes = self._space.space.before[name]
            if passes:
                changed = apply_passes(whole.model, whole.map, passes, whole.context).model
                whole = WholeModel(changed, map_model(changed), whole.context)
            found = []
            for block in whole.stream():
                found.append(block.outputs())
                block.replace_module(block.module, found[-1])
            self._targets[name] = found
        return self._targets[name]

    def _leaves_zeros(self, plan: Plan) -> bool:
        """Whether a choice of the plan prunes."""
        kinds = {"body": self._space.space.bodies, "sites": self._space.space.sites}
        kinds |= {"before": self._space.space.before, "after": self._space.space.after}
        passes = [
            each
            for unit, choice in zip(self._space.units, plan, strict=True)
            for each in kinds[unit.kind].get(unit.options[choice], ())
        ]
        return any({"zeros", "pattern"} & set(each.traits()) for each in passes)


def _remaining(model_map: ModelMap, kept: Sequence[int]) -> ModelMap:
    """Names and places of the blocks once the others are gone; their sites are not read here."""
    names = [info.name for info in model_map.blocks]
    blocks = (replace(model_map.blocks[index], index=place, name=names[place]) for place, index in enumerate(kept))
    return replace(model_map, blocks=tuple(blocks))


def _has_form(block: nn.Module, name: str) -> bool:
    """Whether that module can be trained; one that cannot stays as it is."""
    module = block.get_submodule(name)
    return isinstance(module, CompressedModule) and type(module).trainable is not CompressedModule.trainable


def _magnitude(parameter: nn.Parameter) -> float:
    """Mean over what is not zero; a vector of zeros is a bias that begins there."""
    values = parameter.detach().abs()
    return float(values.sum() / values.count_nonzero().clamp_min(1)) or 1e-3


@torch.no_grad()
def _restore_zeros(pruned: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, zero in pruned:
        parameter.masked_fill_(zero, 0)
