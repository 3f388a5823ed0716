"""Which weights every recipe that ships makes of the bundled model, as hashes: after a change that should move no
number, `--check` lists every recipe whose weights moved.

    python evals/golden.py --store       hashes → evals/results/golden.json
    python evals/golden.py --check       exit code 1 when any hash differs

Hashes are those of one processor, torch and major of transformers: store before a
change, check after it, on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open

from llmcompress import CompressError, compress
from llmcompress.presets import load_preset, preset_names

RESULTS = Path(__file__).resolve().parent / "results" / "golden.json"
MODEL = "builtin:books-llama"
SETTINGS = ["calibration.samples=8", "calibration.tokens=128", "evaluate.perplexity=[]"]
"""Of the recipes for Hub models; the tiny ones run as they are, but for their evaluation."""


def main() -> int:
    """Run the recipes asked for; store or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--file", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=None, help="names of recipes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(given.file.read_text()) if given.file.exists() else {}
    moved = []
    for name in given.only or preset_names():
        began = time.perf_counter()
        found = weights_of(name)
        print(f"{name:28} {found['weights'][:16]}  {time.perf_counter() - began:6.1f} s", file=sys.stderr, flush=True)
        if given.check and known.get(name) != found:
            moved.append(f"{name}: {known.get(name)} → {found}")
        if given.store:
            known[name] = found
            given.file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print("\n".join(moved) or "no weights moved")
    return int(bool(moved))


def weights_of(name: str) -> dict[str, str]:
    """Hashes of the tensors and of the config that a recipe makes of the bundled model, or why it is refused."""
    own_data = [] if name.startswith("tiny/") else [*SETTINGS[:2], "calibration.source=builtin:calibration"]
    recipe = load_preset(name, settings=[*own_data, SETTINGS[2]])
    if not name.startswith("tiny/"):
        recipe = _shortened(_grouped_by_64(recipe))
    with tempfile.TemporaryDirectory() as folder:
        try:
            compress(MODEL, recipe, Path(folder) / "out")
        except CompressError as refused:
            return {"weights": f"refused: {refused.code}", "config": ""}
        return {
            "weights": _tensors(Path(folder) / "out"),
            "config": _sha((Path(folder) / "out/config.json").read_bytes()),
        }


def _grouped_by_64(recipe: Any) -> Any:
    """The bundled model's 192 inputs do not divide into groups of 128."""
    from llmcompress.recipe import parse_recipe

    return parse_recipe(recipe.to_yaml().replace("_g128", "_g64"), "golden")


def _shortened(recipe: Any) -> Any:
    """With a few steps in the place of a paper's thousands."""
    passes = []
    for each in recipe.passes:
        fewer = {"steps": min(each.steps, 64)} if hasattr(each, "steps") else {}
        if hasattr(each, "training"):
            few = {"steps": min(each.training.steps, 100), "gradient_accumulation": 1}
            fewer["training"] = each.training.model_copy(update=few)
        passes.append(each.model_copy(update=fewer))
    return recipe.model_copy(update={"passes": tuple(passes)})


def _tensors(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key).contiguous()
                found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
