"""Every distillation objective on the same student, the same text and the same steps.

    OMP_NUM_THREADS=1 python evals/distillation.py --name books-llama

The student is the bundled model without one block and a quarter of the other blocks' parameters; the bundled model
teaches it on `builtin:calibration`. Measured on `builtin:evaluation`, which nothing was trained on or chosen by: KL to
and from the teacher, perplexity, calibration error, and ROUGE-L between greedy continuations of the same beginnings.
Learning rate, batch and steps are the same for all; nothing was tuned for one of them. Seeds change the order of the
text and what is drawn. Every row is written when it is measured: a stopped program goes on.

N = windows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.generations.statistics import rouge_l
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.probe import map_model
from llmcompress.numerics.calibration_error import expected_calibration_error
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

EVALS = Path(__file__).resolve().parent
OWN = {"fraction": 1.0, "prompt": 16, "tokens": 48}
PRUNING = "passes: [{depth: {count: 1}}, {width: {fraction: 0.25}}]"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross-entropy alone": {},
    "kl": {"objective": {"kl": {}}},
    "kl, reverse": {"objective": {"kl": {"direction": "reverse"}}},
    "kl, half cross-entropy": {"objective": {"kl": {"weight": 0.5}}},
    "kl, temperature 2": {"objective": {"kl": {"temperature": 2.0}}},
    "jsd 0.5": {"objective": {"jsd": {}}},
    "skew_kl": {"objective": {"skew_kl": {}}},
    "skew_kl, reverse": {"objective": {"skew_kl": {"direction": "reverse"}}},
    "total_variation": {"objective": {"total_variation": {}}},
    "universal_logit": {"objective": {"universal_logit": {}}},
    "kl + hidden_states (kept)": {"objective": {"kl": {}, "hidden_states": {"layers": "kept", "factor": 0.1}}},
    "kl + attention_relations (kept)": {
        "objective": {"kl": {}, "attention_relations": {"layers": "kept", "heads": "kept"}}
    },
    "kl + activation_maps (kept)": {"objective": {"kl": {}, "activation_maps": {"layers": "kept", "factor": 10.0}}},
    "kl + adversarial": {"objective": {"kl": {}, "adversarial": {}}},
    "mutual": {"objective": {"mutual": {}}},
    "sequence level": {"objective": {"cross_entropy": {}}, "on_policy": {**OWN, "by": "teacher"}},
    "gkd: jsd 0.5, half on-policy": {"objective": {"jsd": {}}, "on_policy": {**OWN, "fraction": 0.5}},
    "on-policy: kl, reverse": {"objective": {"kl": {"direction": "reverse"}}, "on_policy": OWN},
    "distillm: skew_kl reverse, adaptive": {
        "objective": {"skew_kl": {"direction": "reverse"}},
        "on_policy": {**OWN, "adaptive": True, "validate_every": 10},
    },
    "distillm-2: contrastive": {"objective": {"contrastive": {}}, "on_policy": OWN},
    "minillm": {"objective": {"minillm": {}}, "on_policy": OWN},
}
"""Name of a row → options of `distill`; none: `recover` without a teacher."""


class Bench:
    """Teacher, student and texts, which all rows share."""

    def __init__(self, model: str, *, windows: int, tokens: int) -> None:
        self.model, self._windows, self._tokens = model, windows, tokens
        self.dense = self._loaded()
        passes = parse_recipe(PRUNING, "the student").passes
        context = RunContext(self.windows("builtin:calibration", 0)[:16])
        dense = self._loaded().model
        self.student = apply_passes(dense, map_model(dense), passes, context).model
        self.measured_NT = self.windows("builtin:evaluation", 0)[:48]
        self.teacher_NTV = logits(self.dense.model, self.measured_NT)
        self.texts = self.continued(self.dense.model)

    def _loaded(self) -> Loaded:
        return load_for_compression(find_source(self.model), dtype=torch.float32)

    def windows(self, source: str, seed: int) -> Tensor:
        """N×T of a text."""
        settings = Calibration(source=source, samples=self._windows, tokens=self._tokens)
        made = calibration_windows(
            settings, self.dense.tokenizer, max_positions=self._tokens, seed=seed, progress=Silent()
        )
        return made.windows_NT

    def trained(self, options: dict[str, Any], training: dict[str, Any], seed: int) -> tuple[PreTrainedModel, float]:
        """The student afterwards, and seconds per step."""
        name, more = ("distill", {"teacher": "original"}) if options else ("recover", {})
        text = json.dumps([{name: {**more, **options, "training": training}}])
        context = RunContext(self.windows("builtin:calibration", seed), seed=seed, teachers=TeacherFiles(self.model))
        model = copy.deepcopy(self.student)
        began = time.perf_counter()
        model = apply_passes(model, map_model(model), parse_recipe(f"passes: {text}", "a row").passes, context).model
        return model, (time.perf_counter() - began) / training["steps"]

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """What one row says of a model."""
        both = (logits(model, self.measured_NT), self.teacher_NTV)
        q, p = (each[:, :-1].flatten(0, 1).log_softmax(-1) for each in both)
        targets_R = self.measured_NT[:, 1:].flatten()
        best_R, at_R = q.max(-1)
        return {
            "forward_kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "reverse_kl": float((q.exp() * (q - p)).sum(-1).mean()),
            "perplexity": float(functional.nll_loss(q, targets_R).exp()),
            "ece": expected_calibration_error(best_R.exp(), at_R == targets_R),
            "rouge_l": sum(found := rouge_l(self.texts, self.continued(model))) / len(found),
        }

    @torch.no_grad()
    def continued(self, model: PreTrainedModel) -> list[str]:
        """Greedy continuations of the beginnings of all measured windows."""
        begun_NT = self.measured_NT[:, :16]
        seen_NT = torch.ones_like(begun_NT)
        made_NT = model.generate(begun_NT, attention_mask=seen_NT, max_new_tokens=32, do_sample=False, pad_token_id=1)
        return [str(self.dense.tokenizer.decode(row_T, skip_special_tokens=True)) for row_T in made_NT[:, 16:]]


@torch.no_grad()
def logits(model: PreTrainedModel, windows_NT: Tensor) -> Tensor:
    """N×T×V, a few windows at a time."""
    return torch.cat([model(input_ids=part).logits.float() for part in windows_NT.split(8)])


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--name", default="books-llama", show_default=True, help="of the result")
@click.option("--steps", default=50, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="of a window")
@click.option("--windows", default=256, show_default=True, help="to train on")
@click.option("--only", multiple=True, help="name of a row; several may be given")
def main(model: str, name: str, steps: int, seeds: int, tokens: int, windows: int, only: tuple[str, ...]) -> None:
    """Measure the rows that are not there yet."""
    torch.manual_seed(0)
    bench = Bench(model, windows=windows, tokens=tokens)
    training = {"steps": steps, "batch": 8, "learning_rate": 1e-3, "save_every": 10**6}
    facts = {"model": model, "tokens": tokens, "windows": windows, "training": training, "bos": True}
    path = EVALS / "results" / f"distillation-{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(known.get(key) == value for key, value in facts.items())
    rows: list[dict[str, Any]] = known["rows"] if same else []
    told = {**facts, "machine": machine(), "versions": versions()}
    told["student"] = bench.measured(bench.student)
    told["teacher"] = bench.measured(bench.dense.model)
    for seed in range(seeds):
        for row, options in OBJECTIVES.items():
            there = any(each["row"] == row and each["seed"] == seed for each in rows)
            if there or (only and row not in only):
                continue
            adaptive = options.get("on_policy", {}).get("adaptive")
            held_out = {"validation": 0.05} if adaptive else {}
            found, seconds = bench.trained(options, {**training, **held_out}, seed)
            rows.append({"row": row, "seed": seed, **bench.measured(found), "seconds_per_step": seconds})
            path.write_text(json.dumps({**told, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            click.echo(f"{row} {seed}: KL {rows[-1]['forward_kl']:.4f}, {seconds:.2f} s per step")


if __name__ == "__main__":
    main()
