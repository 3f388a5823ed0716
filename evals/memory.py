"""How much memory compressing a model from disk takes, what the dry run estimated, and whether depth matters.

    python evals/memory.py --name m1100
    python evals/memory.py --name m1100 --blocks 22 --blocks 44 --scheme int4_g128

Llama shapes of random weights in float16 (weights do not matter here), written to a scratch folder; every run is a
process of its own whose peak resident memory the kernel tells. Writes evals/results/memory-NAME.json after every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmcompress.evaluation.environment import machine, versions
from llmcompress.loading.source import find_source

SHAPES = {
    "m110": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12},
    "m1100": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
}
RUN = """
import json, re, sys, torch
from pathlib import Path
from llmcompress import compress, plan
from llmcompress.cost import this_machine
from llmcompress.recipe import parse_recipe
model, output, recipe, offload, what = sys.argv[1:]
recipe = parse_recipe(recipe, "evals")
if what == "plan":
    machine = this_machine(torch.device("cpu"))
    print(json.dumps({"bytes": plan(model, recipe, offload=offload, machine=machine).peak_memory_bytes}))
else:
    seconds = compress(model, recipe, output, offload=offload).report.seconds
    # not getrusage: its peak is inherited from the process that started this one
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"bytes": 1024 * int(peak[1]), "seconds": seconds}))
"""


@click.command()
@click.option("--name", type=click.Choice(tuple(SHAPES)), required=True, help="the shape")
@click.option("--blocks", "counts", multiple=True, type=int, default=(22, 44), show_default=True)
@click.option("--offload", "modes", multiple=True, default=("always",), show_default=True)
@click.option("--scheme", default="int4_g128", show_default=True)
@click.option("--samples", default=8, show_default=True)
@click.option("--tokens", default=512, show_default=True)
def main(name: str, counts: tuple[int, ...], modes: tuple[str, ...], scheme: str, samples: int, tokens: int) -> None:
    """Run every number of blocks in every mode."""
    recipe = (
        f"calibration: {{samples: {samples}, tokens: {tokens}, batch: 8}}\npasses: [{{gptq: {{scheme: {scheme}}}}}]\n"
        "evaluate: {perplexity: []}\n"
    )
    path = Path(__file__).parent / "results" / f"memory-{name}.json"
    rows: list[dict[str, object]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            size = write(folder, name, count)
            for mode in modes:
                arguments = [str(folder), str(Path(scratch) / "out"), recipe, mode]
                estimated, found = run(arguments, "plan"), run(arguments, "compress")
                row = {
                    "blocks": count,
                    "offload": mode,
                    "bytes_model": size,
                    "peak_bytes": found["bytes"],
                    "estimated_bytes": estimated["bytes"],
                    "seconds": found["seconds"],
                }
                rows = [each for each in rows if (each["blocks"], each["offload"]) != (count, mode)] + [row]
                click.echo(str(row), err=True)
                facts = {
                    "shape": name,
                    "scheme": scheme,
                    "samples": samples,
                    "tokens": tokens,
                    "rows": rows,
                    "versions": versions(),
                    "machine": machine(),
                }
                path.write_text(json.dumps(facts, indent=1) + "\n")
    click.echo(str(path))


def write(folder: Path, name: str, blocks: int) -> int:
    """A model folder with the bundled tokenizer; bytes of its weights."""
    config = LlamaConfig(
        vocab_size=32000,
        num_hidden_layers=blocks,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder, max_shard_size="1GB")
    for file in find_source("builtin:books-llama").folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(arguments: list[str], what: str) -> dict[str, object]:
    """What the program prints on its last line, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments, what], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
