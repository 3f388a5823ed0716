"""How a model's predictions differ from the dense one's, token by token of the same windows.

P = predictions of a window that count, K = top tokens of the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.evaluation.bootstrap import Bootstrap
from llmcompress.evaluation.confidence import calibration_change, calibration_sums
from llmcompress.evaluation.scores import WindowScores
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.measurements import Divergence

QUANTILES = {"kl_median": 0.5, "kl_90": 0.9, "kl_99": 0.99, "kl_999": 0.999}

LEAST_TAIL = 2.0**-23
"""Probability of all tokens that were not looked at, at least: below, it is the rounding of float32."""


class AgainstDense:
    """KL, loss, and which tokens are held most likely, against the dense model's scores of the same windows.

    The scores that are added must have looked at the tokens that the dense ones looked at.
    """

    def __init__(self, text: EvaluationText, dense: Sequence[WindowScores]) -> None:
        self._text, self._dense = text, dense
        self._pairs: list[tuple[WindowScores, WindowScores]] = []

    def add(self, scores: WindowScores) -> None:
        """Add a window beside the dense one."""
        dense = self._dense[scores.window]
        assert torch.equal(dense.targets_P, scores.targets_P), "scores of other windows"
        self._pairs.append((dense, scores))

    def result(self) -> Divergence:
        """Quantiles are observed values."""
        text, pairs, samples = self._text, self._pairs, Bootstrap(len(self._pairs))
        kl = [divergences(dense.logprobs_PK, own.logprobs_PK) for dense, own in pairs]
        delta_p = [own.logprob_P.double().exp() - dense.logprob_P.double().exp() for dense, own in pairs]
        right = [(dense.best_P == dense.targets_P, own.best_P == own.targets_P) for dense, own in pairs]
        calibration = torch.cat([calibration_sums([pair[side] for pair in pairs]) for side in (0, 1)], -1)
        quantiles = {name: samples.quantile(kl, share) for name, share in QUANTILES.items()}
        return Divergence(
            text=text.name,
            protocol=text.protocol,
            window=text.window,
            bos=text.bos,
            tokens=sum(map(len, kl)),
            top=pairs[0][0].logprobs_PK.shape[-1],
            top_mass=samples.mean([dense.logprobs_PK.double().exp().sum(-1) for dense, _ in pairs]).mean,
            kl=samples.mean(kl),
            kl_median=quantiles["kl_median"][0],
            kl_90=quantiles["kl_90"][0],
            kl_99=quantiles["kl_99"][0],
            kl_999=quantiles["kl_999"][0],
            kl_intervals={name: interval for name, (_, interval) in quantiles.items() if interval is not None},
            loss_increase=samples.mean([dense.logprob_P.double() - own.logprob_P.double() for dense, own in pairs]),
            same_top=samples.mean([own.best_P == dense.best_P for dense, own in pairs]),
            right_to_wrong=samples.mean([before & ~after for before, after in right]),
            wrong_to_right=samples.mean([after & ~before for before, after in right]),
            delta_p=samples.mean(delta_p),
            delta_p_rms=samples.statistic(_square_sums(delta_p), _root_mean),
            calibration_error_change=samples.statistic(calibration, calibration_change),
        )


def divergences(dense_PK: Tensor, other_PK: Tensor) -> Tensor:
    """KL(dense ‖ other) of every token in nats, float64, from log-probabilities of the same K tokens.

    All further tokens count as one, whose probability is what the K leave over.
    """
    p_PK, q_PK = dense_PK.double().exp(), other_PK.double().exp()
    tail_P, other_tail_P = ((1 - each.sum(-1)).clamp(min=LEAST_TAIL) for each in (p_PK, q_PK))
    seen_P = (p_PK * (dense_PK.double() - other_PK.double())).sum(-1)
    return (seen_P + tail_P * (tail_P.log() - other_tail_P.log())).clamp(min=0)


def _square_sums(windows: Sequence[Tensor]) -> Tensor:
    sums = torch.stack([window.square().sum() for window in windows])
    return torch.stack([sums, torch.tensor([float(len(window)) for window in windows], dtype=torch.float64)], -1)


def _root_mean(sums: Tensor) -> Tensor:
    return (sums[..., 0] / sums[..., 1]).sqrt()
