"""CPU seconds a step and peak memory of trainings, ours and TRL's, on the same job; and what a stored teacher saves.

    OMP_NUM_THREADS=1 python evals/training_speed.py --model SmolLM2-135M-Instruct --text valid.txt

Every measurement is a process of its own with one thread, and they run in turns; the first step of each warms it up and
is not counted.
Jobs, with AdamW on the same windows, in float32 unless a row says otherwise:
  labels     all weights, cross-entropy: ours, TRL's SFTTrainer, and the bare forward, backward and optimizer step
  adapters   LoRA of rank 8 on every linear, cross-entropy: ours, TRL's SFTTrainer with PEFT, and the bare loop
  on-policy  all weights, reverse KL from a teacher on texts that the student writes: ours, TRL's DistillationTrainer
  teacher    forward KL to a teacher that runs along, in float32 and, as its student, in bfloat16, and to what was
             stored of it (64 tokens and their tail): ours
  larger teacher   the same, taught by random weights of 1.1 B parameters (22 blocks of width 2048)

Writes evals/results/training-speed-NAME.json after every turn.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from llmcompress.calibration.context import RunContext
from llmcompress.evaluation.environment import machine, versions
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.run import Run

HERE = Path(__file__).resolve().parent
RATE, RANK, PROMPT, NEW, KEPT = 1e-5, 8, 32, 64, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Steps = list[float]


class Clock(Silent):
    """Notes when a training reports a step."""

    def __init__(self) -> None:
        self.times: Steps = []

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """`recover: step 3/5, loss 2.100`."""
        if re.search(r": step \d+/\d+, loss", text):
            self.times.append(time.process_time())


class Noted(TrainerCallback):  # type: ignore[misc]
    """The same in a trainer of TRL."""

    def __init__(self) -> None:
        self.times: Steps = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called after the optimizer."""
        self.times.append(time.process_time())


class Job:
    """What a child process is told."""

    def __init__(self, model: str, text: str, steps: int, batch: int, tokens: int, larger: str = "") -> None:
        self.model, self.steps, self.batch, self.larger = model, steps, batch, larger
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        ids = self.tokenizer(Path(text).read_text(encoding="utf-8")[:400_000], add_special_tokens=False)["input_ids"]
        self.windows_NT = torch.tensor(ids[: steps * batch * tokens]).view(-1, tokens)

    def ours(self, name: str, mixed_precision: str | None = None, **options: Any) -> Steps:
        """A pass on the dense model."""
        training = {
            "steps": self.steps, "batch": self.batch, "learning_rate": RATE, "warmup": 0.0, "schedule": "constant",
            "mixed_precision": mixed_precision,
        }  # fmt: skip
        loaded, clock = load_for_compression(find_source(self.model), dtype=torch.float32), Clock()
        with (
            tempfile.TemporaryDirectory() as folder,
            Run.open(Path(folder) / "compressed", fingerprint={}, lock_text="", fresh=False) as run,
        ):
            if stored := options.get("stored"):
                stored["folder"] = str(Path(folder) / "scores")
            recipe = parse_recipe(json.dumps({"passes": [{name: {"training": training, **options}}]}), "evals")
            context = RunContext(
                self.windows_NT, batch=self.batch, progress=clock, keep=run, teachers=TeacherFiles(self.model)
            )
            apply_passes(loaded.model, map_model(loaded.model), recipe.passes, context)
        return clock.times

    def bare(self, adapters: bool) -> Steps:
        """Forward, backward, optimizer: nothing else."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        if adapters:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
        times = []
        for ids_BT in self.windows_NT.split(self.batch):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time())
        return times

    def common(self, folder: str) -> dict[str, Any]:
        """Settings of both trainers of TRL."""
        return {
            "output_dir": folder, "max_steps": self.steps, "per_device_train_batch_size": self.batch,
            "learning_rate": RATE, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip

    def sft(self, adapters: bool) -> Steps:
        """TRL's supervised trainer."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        noted = Noted()
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS) if adapters else None
        with tempfile.TemporaryDirectory() as folder:
            SFTTrainer(
                AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32),
                SFTConfig(max_length=self.windows_NT.shape[1], **self.common(folder)),
                train_dataset=Dataset.from_dict({"input_ids": self.windows_NT.tolist()}),
                processing_class=self.tokenizer,
                callbacks=[noted],
                peft_config=config,
            ).train()
        return noted.times

    def distillation(self) -> Steps:
        """TRL's on-policy trainer, reverse KL."""
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        noted = Noted()
        prompts = self.tokenizer.batch_decode(self.windows_NT[:, :PROMPT])
        load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)  # noqa: E731
        with tempfile.TemporaryDirectory() as folder:
            DistillationTrainer(
                load(),
                load(),
                DistillationConfig(max_completion_length=NEW, beta=1.0, **self.common(folder)),
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                processing_class=self.tokenizer,
                callbacks=[noted],
            ).train()
        return noted.times


KL_ONLINE = {"objective": {"kl": {}}}
ROWS: dict[str, Callable[[Job], Steps]] = {
    "labels / ours": lambda job: job.ours("recover"),
    "labels / TRL SFTTrainer": lambda job: job.sft(adapters=False),
    "labels / bare loop": lambda job: job.bare(adapters=False),
    "adapters / ours": lambda job: job.ours("recover", rank=RANK),
    "adapters / TRL SFTTrainer, PEFT": lambda job: job.sft(adapters=True),
    "adapters / bare loop, PEFT": lambda job: job.bare(adapters=True),
    "on-policy / ours": lambda job: job.ours(
        "distill", objective={"kl": {"direction": "reverse"}}, on_policy={"prompt": PROMPT, "tokens": NEW}
    ),
    "on-policy / TRL DistillationTrainer": Job.distillation,
    "teacher / ours, running along": lambda job: job.ours("distill", **KL_ONLINE),
    "teacher / ours, running along, bf16": lambda job: job.ours("distill", "bf16", **KL_ONLINE),
    "teacher / ours, stored": lambda job: job.ours("distill", **KL_ONLINE, stored={"tokens": KEPT}),
    "larger teacher / ours, running along": lambda job: job.ours("distill", **KL_ONLINE, teacher=job.larger),
    "larger teacher / ours, stored": lambda job: job.ours(
        "distill", **KL_ONLINE, teacher=job.larger, stored={"tokens": KEPT}
    ),
}


def larger_teacher(model: str, folder: Path) -> str:
    """A folder with the vocabulary of the model and random weights in the shape of TinyLlama, in bfloat16."""
    config = AutoConfig.from_pretrained(model)
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "head_dim": 64}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    for name, value in {**shape, **heads}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@click.command()
@click.option("--model", required=True, help="Folder.")
@click.option("--text", required=True, help="File.")
@click.option("--steps", default=4, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--name", default="SmolLM2-135M-Instruct", show_default=True)
@click.option("--only", multiple=True, help="A job, or a row.")
@click.option("--child", hidden=True, help="Run this row here.")
@click.option("--larger", default="", hidden=True, help="Folder of the larger teacher.")
def main(
    model: str, text: str, steps: int, batch: int, tokens: int, turns: int, name: str, only: tuple[str, ...],
    child: str | None, larger: str,
) -> None:  # fmt: skip
    """Measure in turns, and write."""
    if child:
        times = ROWS[child](Job(model, text, steps, batch, tokens, larger))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        seconds = [after - before for before, after in pairwise(times)]
        print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * int(peak[1])}))
        return
    path = HERE / "results" / f"training-speed-{name}.json"
    wanted = [row for row in ROWS if not only or row in only or row.partition(" / ")[0] in only]
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in wanted}
    sizes = {"--steps": steps, "--batch": batch, "--tokens": tokens}
    with tempfile.TemporaryDirectory() as scratch:
        if any(row.startswith("larger teacher") for row in wanted):
            larger = larger_teacher(model, Path(scratch))
        told = ["--model", model, "--text", text, "--larger", larger]
        told += [word for key, value in sizes.items() for word in (key, str(value))]
        for _ in range(turns):
            for row in wanted:
                done = subprocess.run(
                    [sys.executable, __file__, *told, "--child", row], stdout=subprocess.PIPE, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{row} failed")
                found[row].append(json.loads(done.stdout.splitlines()[-1]))
                click.echo(f"{row:40s} {found[row][-1]}", err=True)
            facts = {
                "model": name, "steps": steps - 1, "batch": batch, "tokens": tokens, "turns": len(found[wanted[-1]]),
                "threads": torch.get_num_threads(), "versions": versions(), "machine": machine(),
            }  # fmt: skip
            known = json.loads(path.read_text())["rows"] if path.exists() else []
            rows = [each for each in known if each["name"] not in wanted] + [summary(row, found[row]) for row in wanted]
            rows.sort(key=lambda row: list(ROWS).index(row["name"]))
            path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def summary(name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    return {
        "name": name,
        "seconds_per_step": statistics.median(second for turn in turns for second in turn["seconds"]),
        "by_turn": [statistics.median(turn["seconds"]) for turn in turns],
        "peak_bytes": statistics.median(turn["peak_bytes"] for turn in turns),
    }


if __name__ == "__main__":
    main()
