"""Quantizes the embedding and the output head, most of the bytes of small models. V = entries, D = width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.formats import packed
from llmcompress.formats.named import Kind
from llmcompress.model.embedding_multiplier import embedding_multiplier
from llmcompress.model.map import ModelMap
from llmcompress.model.rotation import untie
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.grid import Fitted, restore, round_to_codes
from llmcompress.numerics.ranges import RangeSearch, fit
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.passes.schemes import Indivisible, indivisible_error
from llmcompress.records.rows import SiteReport


@PASSES.register("embeddings")
class Embeddings(ModelPass):
    """Quantize the embedding and the output head, which all other passes leave dense; no data.

    A lookup dequantizes only its rows. `score` in the report is the squared error of a table ÷ its squared norm.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"tables"})
    conflicts: ClassVar[Mapping[Trait, str]] = {"tables": "needs an ordinary embedding and output head"}
    keeps_codes: ClassVar[bool] = True

    embedding: str | None = Field(
        "int8_channel", description=f"scheme of the embedding, weight-only; null: dense. {DESCRIPTION}"
    )
    head: str | None = Field(
        "int8_channel", description="scheme of the output head; null: dense; its inputs may be quantized per token"
    )
    tied: Literal["share", "untie"] = Field(
        "share",
        description="tied embedding and head. share: one quantized table for both, with equal schemes; "
        "untie: one table each",
    )
    range: RangeSearch = Field(
        "mse",
        description="mse: clip ranges to minimize the squared error; joint: also search signs or zero points; "
        "minmax: cover all values",
    )

    required: bool = Field(
        True,
        description="false: left out unless `save.format` names a target that holds a rounded embedding (stock loaders "
        "read none), and where weights are offloaded or several processes work",
    )

    @field_validator("embedding", "head")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and named_scheme(name).measures_inputs:
            raise ValueError(
                "this pass does not calibrate activations: use a weight-only scheme or dynamic activations"
            )
        return name

    @field_validator("embedding")
    @classmethod
    def _no_inputs(cls, name: str | None) -> str | None:
        if name is not None and named_scheme(name).activations:
            raise ValueError("the inputs of an embedding are token ids: use a weight-only scheme")
        return name

    @override
    def selects(self, site: str) -> bool:
        """No linear of a block."""
        return False

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def check(self, model_map: ModelMap) -> None:
        if self._shares(model_map) and self.embedding != self.head:
            raise CompressError(
                "embeddings.tied",
                "the output head is tied to the embedding, but the two have different schemes",
                where=f"embedding: {self.embedding}, head: {self.head}",
                fix="give both the same scheme, or set `tied: untie` to store one table each",
                exit_code=ExitCode.USAGE,
            )

    @override
    def rounds_embedding(self) -> Scheme | None:
        return None if self.embedding is None else named_scheme(self.embedding)

    @override
    def head_scheme(self, scheme: str | None, model_map: ModelMap) -> str | None:
        return self.head

    @override
    def is_optional(self) -> bool:
        return not self.required

    @override
    def tensors_outside(self, tensors: Mapping[str, Kind], model_map: ModelMap, dtype: torch.dtype) -> dict[str, Kind]:
        """Codes and scales in the place of tables; a head that shares the embedding's has nothing of its own."""
        found = dict(tensors)
        dense = tensors.get(f"{model_map.embedding}.weight")
        if dense is None:  # another pass took it apart: the report will say
            return found
        rounded = {model_map.embedding: self.embedding}
        if not self._shares(model_map):
            rounded[model_map.head] = self.head
        for name, scheme in rounded.items():
            if scheme is not None:
                found.pop(f"{name}.weight", None)
                kinds = packed.tensors(dense[1], named_scheme(scheme), dtype, bias=False)
                found |= {f"{name}.{part}": kind for part, kind in kinds.items()}
        if model_map.tied and not self._shares(model_map) and self.head is None:
            found[f"{model_map.head}.weight"] = dense
        return found

    def _shares(self, model_map: ModelMap) -> bool:
        return model_map.tied and self.tied == "share"

    @torch.no_grad()
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Replace both, as the options say."""
        model, names, shares = whole.model, whole.map, self._shares(whole.map)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        _require_plain(embedding, names.embedding)
        assert isinstance(embedding, nn.Embedding)
        if names.tied:
            untie(model)
        rows = []
        if self.embedding is not None:
            scheme, multiplier = named_scheme(self.embedding), embedding_multiplier(model, embedding)
            codes_VD, fitted, lost = self._rounded(
                names.embedding, embedding.weight, scheme, whole.context.storage_dtype
            )
            table = QuantEmbedding.of(scheme, codes_VD, _as(fitted, embedding.weight.dtype), multiplier)
            model.set_input_embeddings(table.train(embedding.training))
            rows.append(_row(names.embedding, table, whole.context.storage_dtype, lost))
            if shares:
                bias = getattr(head, "bias", None)
                outputs, inputs = codes_VD.shape
                shared = SharedHead(names.embedding, outputs, inputs, None if bias is None else bias.detach())
                shared.connect(model)
                model.set_output_embeddings(shared.train(head.training))
                return [*rows, SiteReport(site=names.head, algorithm="embeddings", scheme=scheme.name, parameters=0)]
        if self.head is not None:
            _require_plain(head, names.head)
            rows.append(self._round_head(model, names.head, head, whole.context.storage_dtype))
        return rows

    def _round_head(self, model: PreTrainedModel, name: str, head: nn.Module, storage: torch.dtype) -> SiteReport:
        scheme, weight, bias = named_scheme(str(self.head)), head.get_parameter("weight"), getattr(head, "bias", None)
        codes_VD, fitted, lost = self._rounded(name, weight, scheme, storage)
        bias_V = None if bias is None else bias.detach()
        linear = QuantLinear.from_fitted(scheme, codes_VD, _as(fitted, weight.dtype), bias_V)
        model.set_output_embeddings(linear.train(head.training))
        return _row(name, linear, storage, lost)

    def _rounded(self, name: str, weight: Tensor, scheme: Scheme, storage: torch.dtype) -> tuple[Tensor, Fitted, float]:
        """Codes, scales and the share lost.

        Raises: CompressError when the width does not divide into groups.
        """
        group, weight_VD = scheme.weights.span, weight.detach().float()
        if group is not None and weight_VD.shape[1] % group:
            raise indivisible_error([Indivisible(name, weight_VD.shape[1], scheme)])
        fitted = fit(weight_VD, scheme.weights, scale_dtype=storage, search=self.range)
        codes_VD = round_to_codes(weight_VD, fitted)
        error = (restore(codes_VD, fitted) - weight_VD).double().square().sum()
        return codes_VD, fitted, float(error / weight_VD.double().square().sum().clamp_min(1e-300))


def _as(fitted: Fitted, dtype: torch.dtype) -> Fitted:
    """Scales in the dtype of the model that takes them; two levels stay as they are until they are taken apart."""
    if fitted.shared is not None:
        return fitted
    return Fitted(fitted.grid, fitted.scale_OG.to(dtype), fitted.zero_OG.to(dtype))


def _require_plain(module: nn.Module, name: str) -> None:
    if isinstance(module, CompressedModule) or not isinstance(module, nn.Embedding | nn.Linear):
        raise CompressError(
            "embeddings.not-plain",
            f"{name} is a {type(module).__name__}, not an nn.Embedding or nn.Linear",
            where=name,
            fix="use this pass once, and before any pass that replaces the embedding or head",
            saved="all finished work",
        )


def _row(name: str, module: QuantLinear, storage: torch.dtype, lost: float) -> SiteReport:
    outputs, inputs = module.codes_OI.shape
    bits = module.scheme.bits_per_weight(outputs, inputs, torch.finfo(storage).bits)
    return SiteReport(site=name, algorithm="embeddings", scheme=module.scheme.name, bits_per_weight=bits, score=lost)
