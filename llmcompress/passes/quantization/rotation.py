"""Rotation: removes outlier channels from the residual stream, heads and FFN inputs, so that they quantize well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.formats.named import Kind
from llmcompress.model.embedding_norm import bake_embedding_norm
from llmcompress.model.head_rotation import Basis, rotate_heads
from llmcompress.model.map import ModelMap
from llmcompress.model.narrow import narrow
from llmcompress.model.residual_probe import find_residual
from llmcompress.model.rotation import make_rotatable
from llmcompress.model.site import LinearSite
from llmcompress.model.units import feed_forward_readers
from llmcompress.modules.low_rank import linear_of
from llmcompress.modules.transformed_input import RotatedInput
from llmcompress.numerics.basis import random_basis
from llmcompress.numerics.hadamard import hadamard, spreading_basis, transformed, uniform_basis
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.quantization.learned_rotation import LearnedRotation, learn
from llmcompress.records.rows import SiteReport

_MIXED = "would fill the zeros: a rotation mixes all channels"

STREAM = {"hadamard": spreading_basis, "random": uniform_basis}


@PASSES.register("rotation")
class Rotation(ModelPass):
    """Rotate the residual stream by an orthogonal matrix that is folded into all weights, which spreads outliers
    evenly.

    The model computes the same, and its config stays plain (a tied head is untied). A Hadamard matrix spreads best; for
    widths that have none, it is the product of one for the powers of two and a Hartley matrix.

    Source: Ashkboos et al. (QuaRot), arXiv 2404.00456; Liu et al. (SpinQuant), arXiv 2405.16406 (`learned`). Differs:
    where norms subtract the mean, the rotation keeps the direction of all ones; queries and keys are not rotated.
    """

    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": _MIXED,
        "pattern": _MIXED,
        "tables": "needs an ordinary embedding and output head to rotate",
    }

    basis: Literal["hadamard", "random"] = Field(
        "hadamard", description="hadamard: randomised, spreads outliers best; random: uniform over all bases"
    )
    stream: bool = Field(True, description="rotate the residual stream")
    heads: bool = Field(True, description="also rotate the values of every attention head, folded into v and o")
    online: bool | tuple[str, ...] = Field(
        False,
        description="online Hadamard transform of the input of down_proj; true, or globs of such sites; the result "
        "loads only with our plug-in",
    )
    learned: LearnedRotation | None = Field(
        None, description="learn the rotation on the loss of the quantized model, e.g. {steps: 100}"
    )

    @model_validator(mode="after")
    def _learned_is_the_stream(self) -> Self:
        if self.learned and not self.stream:
            raise ValueError("`learned` trains the rotation of the residual stream: `stream` must be true")
        return self

    @field_validator("online", mode="before")
    @classmethod
    def _one_glob(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @override
    def uses_data(self) -> bool:
        return self.learned is not None

    @override
    def for_model(self, model_map: ModelMap) -> Self:
        """With the names of the sites that get an online transform."""
        return self if self.online is False else self.model_copy(update={"online": self._online_sites(model_map)})

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        """A linear after an online transform has another name."""
        return (f"{site}.kept",) if self._matches(site) else (site,)

    @override
    def check(self, model_map: ModelMap) -> None:
        """Raises: CompressError when no site reads the inside of an FFN where the options say so."""
        if self.online is not False and not self._online_sites(model_map):
            raise CompressError(
                "rotation.no-sites",
                "no selected site reads the hidden activations of an FFN",
                where="rotation.online",
                fix=f"select {', '.join(sorted(_inner_sites(model_map))[:1]) or 'nothing: set `online: false`'}",
                exit_code=ExitCode.USAGE,
            )

    @override
    def rotates_stream(self) -> bool:
        return self.stream

    @override
    def needs_plugin(self) -> bool:
        return self.online is not False

    @override
    def tensors_outside(self, tensors: Mapping[str, Kind], model_map: ModelMap, dtype: torch.dtype) -> dict[str, Kind]:
        """The last norm moves into the head, so no head stays tied."""
        return model_map.with_own_head(tensors) if self.stream else dict(tensors)

    @override
    def backward(self) -> Backward | None:
        if not self.learned:
            return None
        return Backward(copies=3, windows=self.learned.batch, trained_on=self.learned.windows)

    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Heads, then online transforms, then the stream.

        Raises: CompressError, naming the module, where a change of basis is not exact.
        """
        whole.model.float()
        generator, sites = whole.context.generator(), whole.sites()
        rotated = self._rotate_heads(whole, sites, generator) if self.heads else set[str]()
        online = self._online_sites(whole.map)
        for site in sites:
            if site.name in online and not site.is_compressed:
                turned_OI = transformed(site.weight_OI, site.info.inputs)
                site.replace(RotatedInput(linear_of(turned_OI, site.bias_O)))
        score = self._rotate_stream(whole, sites, generator) if self.stream else None
        return [
            SiteReport(
                site=info.name,
                algorithm="rotation",
                parameters=sum(p.numel() for p in whole.model.get_submodule(info.name).parameters()),
                score=score,
                degraded="its heads are not rotated" if self.heads and info.name not in rotated else None,
            )
            for info in whole.map.blocks
        ]

    def _rotate_heads(self, whole: WholeModel, sites: Sequence[LinearSite], generator: torch.Generator) -> set[str]:
        bases: dict[str, Basis] = {"hadamard": hadamard, "random": partial(random_basis, generator=generator)}
        return rotate_heads(whole.model, whole.map, sites, bases[self.basis])

    def _rotate_stream(
        self, whole: WholeModel, sites: Sequence[LinearSite], generator: torch.Generator
    ) -> float | None:
        """What learning has taken from the loss of the rounded model, if it did."""
        bake_embedding_norm(whole.model)
        residual = find_residual(whole.model)
        make_rotatable(whole.model, residual, constants="mean", generator=generator)
        kept_DK = STREAM[self.basis](residual.width, generator, centred=residual.centred)
        found = learn(whole, residual, kept_DK, sites, self.learned) if self.learned else None
        narrow(whole.model, residual, found.kept_DK if found else kept_DK, {})
        return found.loss - found.loss_at_start if found else None

    def _online_sites(self, model_map: ModelMap) -> tuple[str, ...]:
        return tuple(name for name in _inner_sites(model_map) if self._matches(name))

    def _matches(self, site: str) -> bool:
        globs = self.online if isinstance(self.online, tuple) else ("*",) * self.online
        return any(fnmatchcase(site, glob) for glob in globs)


def _inner_sites(model_map: ModelMap) -> list[str]:
    return [block.full(name) for block in model_map.blocks for name in sorted(feed_forward_readers(block.structure))]
