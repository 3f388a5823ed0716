"""Every plan of a small space on the bundled model, judged once: the table on which optimizers are compared.

    OMP_NUM_THREADS=1 python evals/search_table.py --levels FOLDER --latency evals/results/search-table-latency.json

Five blocks, for each its bits, half of its FFN or all of it, or nothing: one block may be dropped. Losses are KL
divergences from the dense model on the first windows of the bundled calibration text that no pass has seen. Goes on
where it was stopped. Writes evals/results/search-table-books-llama.npz; `optimizers.py` reads it.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.whole import WholeModel
from llmcompress.known_model import known_model
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.file_bytes import bytes_of, with_settled_format
from llmcompress.plan_search.costs.latency_table import read_tables
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Space
from llmcompress.plan_search.tabular import Table, all_plans
from llmcompress.progress import Silent

HERE = Path(__file__).resolve().parent
MODEL = "builtin:books-llama"
SPACE = {
    "sites": {bits: [{"gptq": {"scheme": f"{bits}_g64"}}] for bits in ("int4", "int2")},
    "per": "block",
    "bodies": {"whole": [], "ffn-50": [{"width": {"fraction": 0.5, "heads": False}}]},
    "most_dropped": 0.2,
}
WINDOW = 128
PASSES, JUDGED = 32, 16
"""Windows that passes measure, and windows behind them on which plans are judged."""


@click.command()
@click.option(
    "--levels", required=True, type=click.Path(path_type=Path), help="A folder for levels and partial results."
)
@click.option("--latency", type=click.Path(exists=True, path_type=Path), help="What scripts/measure_latency.py wrote.")
@click.option("--runtime", default="torch", help="Whose table of them.")
@click.option("--minutes", default=1e9, help="Stop after so many; give the command again to go on.")
def main(levels: Path, latency: Path | None, runtime: str, minutes: float) -> None:
    """Judge every plan."""
    source = find_source(MODEL)
    loaded = load_for_compression(source, dtype=torch.float32)
    settings = Calibration(source="builtin:calibration", samples=PASSES + JUDGED, tokens=WINDOW)
    windows_NT = calibration_windows(
        settings, loaded.tokenizer, max_positions=WINDOW, seed=0, progress=Silent()
    ).windows_NT
    space = PlanSpace(Space.model_validate(SPACE), map_model(loaded.model))
    assert len(windows_NT) == PASSES + JUDGED, "the text is too short"
    context = RunContext(windows_NT[:PASSES], storage_dtype=torch.bfloat16)
    whole = WholeModel(loaded.model, space.model_map, context)
    store = build_levels(whole, space, LevelStore(levels / "levels"))
    plans_PU = all_plans(space)
    found = levels / "losses.npy"
    losses_P = np.load(found) if found.exists() else np.full(len(plans_PU), np.nan)
    with Bench(whole, space, store) as bench:
        text, until = bench.text(windows_NT[PASSES:]), time.monotonic() + 60 * minutes
        for row in np.flatnonzero(np.isnan(losses_P)):
            losses_P[row] = float(bench.divergences(tuple(int(each) for each in plans_PU[row]), text).mean())
            if time.monotonic() > until:
                break
    np.save(found, losses_P)
    left = int(np.isnan(losses_P).sum())
    click.echo(f"{len(plans_PU)} plans, {left} left")
    if left:
        return
    known = known_model(source)
    recipe_settings = {"model": MODEL, "calibration": {"source": "builtin:calibration"}}
    costs: dict[str, Additive] = {"bytes": bytes_of(space, known, with_settled_format(space, known, recipe_settings))}
    facts = {"model": MODEL, "window": WINDOW, "judged": JUDGED, "passes": PASSES, "text": "builtin:calibration"}
    if latency:
        costs |= seconds_of(space, read_tables(latency)[runtime])
        facts |= {"latency": latency.name, "runtime": runtime}
    stages = (JUDGED * WINDOW,)
    table = Table(space, stages, plans_PU, losses_P[:, None], costs, store.losses(space), facts)
    out = HERE / "results" / "search-table-books-llama.npz"
    table.write(out)
    click.echo(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
