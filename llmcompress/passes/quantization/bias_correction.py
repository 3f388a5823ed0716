"""Bias correction: the bias absorbs the mean output error of quantization. O = outputs, I = inputs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import codes_of
from llmcompress.numerics.grid import output_error
from llmcompress.numerics.statistics import Gram, Moments, Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.quantizer_wrapper import QuantizerWrapper
from llmcompress.passes.quantizing import dense_of
from llmcompress.records.rows import SiteReport


@PASSES.register("bias_correction")
class BiasCorrection(QuantizerWrapper):
    """Quantize with another pass, then add (W - Ŵ) times the mean input to every bias.

    A linear without a bias is not corrected, and the report says so, because stock model code would silently ignore a
    new bias; `new_biases` adds one, and the result then needs `import llmcompress` to load.

    Source: Nagel et al., arXiv 1906.04721, section 4.2.1 (from data, not from batch statistics).
    """

    new_biases: bool = Field(False, description="add a bias to linears that have none; loads only with our plug-in")

    def needs(self) -> tuple[type[Statistic], ...]:
        """The mean input too."""
        return tuple(dict.fromkeys((*super().needs(), Moments)))

    def improve(self, site: LinearSite, weight_OI: Tensor, row: SiteReport) -> SiteReport:
        """Move the mean error of one site into its bias, where it can be stored and lowers the error."""
        codes, gram = codes_of(site.module), site.statistic(Gram)
        missing_OI = weight_OI - dense_of(codes)
        error_before = float(output_error(missing_OI, gram.sum_II))
        if codes.bias is None and not self.new_biases:
            change = 0.0
        else:
            wanted_O = missing_OI @ site.statistic(Moments).mean_I
            old_O = torch.zeros_like(wanted_O) if codes.bias is None else codes.bias.float()
            # a bias is stored in few bits: only what it really becomes counts
            new_O = (old_O + wanted_O).to(site.storage_dtype).float()
            moved_O = new_O - old_O
            change_O = gram.tokens * (moved_O.square() - 2 * moved_O * wanted_O)
            better_O = change_O < 0
            dtype = codes.scale_OG.dtype if codes.bias is None else codes.bias.dtype
            codes.bias = nn.Parameter(torch.where(better_O, new_O, old_O).to(dtype), requires_grad=False)
            change = float(change_O[better_O].sum(dtype=torch.float64))
        signal = float(output_error(weight_OI, gram.sum_II))
        told = {
            "algorithm": "bias_correction",
            "error": max(error_before + change, 0.0) / signal if signal > 0 else 0.0,
            "error_before": error_before / signal if signal > 0 else 0.0,
            "tokens": gram.tokens,
        }
        if codes.bias is None:
            told["degraded"] = "; ".join(
                filter(None, (row.degraded, "it has no bias to correct: set `new_biases` to add one"))
            )
        return row.model_copy(update=told)
