"""The whole flow: every recipe that ships, killed and resumed runs, what is written and what it says of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import CompressError, compress, evaluate, inspect, load, plan
from llmcompress.calibration.hub_datasets import ALIASES
from llmcompress.elicitation.steps.read import Read
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.model.site import LinearSite
from llmcompress.presets import load_preset, preset_names
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe, parse_recipe
from tests.tiny_folder import edit_tensors, write_tiny_llama
from tests.warm_python import WarmPython

SMALL = [
    "calibration.source=builtin:calibration",
    "calibration.samples=6",
    "calibration.tokens=48",
    "evaluate.perplexity=[{source: 'builtin:evaluation', window: 48, max_windows: 3}]",
]
GPTQ = """
calibration: {samples: 6, tokens: 48, batch: 4}
passes: [{gptq: {scheme: int4_g16}}]
evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 3}]}
"""

NO_EVALUATION = """
calibration: {samples: 6, tokens: 48, batch: 4}
passes: [{gptq: {scheme: int4_g16}}]
evaluate: {perplexity: []}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 wide, so that groups of 128 divide it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 256}
    return write_tiny_llama(folder, **sizes)


def recipe(text: str = GPTQ) -> Recipe:
    return parse_recipe(text, "test")


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, _ = load(folder, **options)
    return model(torch.arange(40)[None]).logits.float()


def shortened(recipe: Recipe) -> Recipe:
    """With a few steps in the place of a paper's thousands."""

    def short(each: Any) -> Any:
        found: dict[str, Any] = {"steps": min(each.steps, 64)} if hasattr(each, "steps") else {}
        if hasattr(each, "training"):
            training = each.training
            fewer = {"steps": min(training.steps, 8), "gradient_accumulation": min(training.gradient_accumulation, 2)}
            found["training"] = training.model_copy(update=fewer)
        return each.model_copy(update=found)

    return recipe.model_copy(update={"passes": tuple(map(short, recipe.passes))})


@pytest.mark.parametrize("preset", preset_names())
def test_every_recipe_that_ships_runs_and_its_result_loads(preset: str, tiny: Path, tmp_path: Path) -> None:
    # a 0.1 M parameter random model in place of the Hub's: what is proven is that the recipe means something
    settings = [each for each in SMALL if "source" not in each or "self" not in preset]
    settings += [
        f"data.{number}.read.source=builtin:calibration"
        for number, step in enumerate(load_preset(preset).data)
        if isinstance(step, Read) and step.source in ALIASES
    ]
    chosen = shortened(load_preset(preset, settings=settings)).model_copy(update={"model": None})
    report = compress(str(tiny), chosen, tmp_path / "out").report
    assert {row.site for row in report.sites} and report.quality
    assert report.bytes_compressed == bytes_on_disk(tmp_path / "out")
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert not list(tmp_path.glob("out.run*")) and not list(tmp_path.glob(".out*"))


def test_the_quickstart_runs_on_the_bundled_model_in_a_few_lines(tmp_path: Path) -> None:
    report = compress("builtin:books-llama", "tiny/rtn", tmp_path / "out").report
    quality = report.quality[0]
    assert 1.0 < quality.ratio < 1.2
    measured = evaluate(str(tmp_path / "out"), load_preset("tiny/rtn").evaluate).perplexities
    assert measured[0].perplexity == pytest.approx(quality.compressed.perplexity, rel=1e-5)
    assert measured[0].tokens == quality.compressed.tokens


def test_saving_loading_and_saving_again_keeps_the_logits(tiny: Path, tmp_path: Path) -> None:
    compress(str(tiny), recipe(), tmp_path / "codes")
    compress(str(tiny), recipe(GPTQ + "save: {format: plain}"), tmp_path / "plain")
    for dtype in (torch.float32, torch.bfloat16):
        codes = logits(tmp_path / "codes", dtype=dtype)
        assert torch.equal(codes, logits(tmp_path / "codes", dtype=dtype))
        again, tokenizer = load(tmp_path / "plain", dtype=torch.bfloat16)
        again.save_pretrained(tmp_path / "again")
        tokenizer.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(
            logits(tmp_path / "again", dtype=dtype), logits(tmp_path / "plain", dtype=dtype), rtol=0, atol=0
        )
    torch.testing.assert_close(
        logits(tmp_path / "codes", dtype=torch.bfloat16), logits(tmp_path / "plain", dtype=torch.bfloat16)
    )


def test_the_folder_carries_its_recipe_report_and_companions(tiny: Path, tmp_path: Path) -> None:
    report = compress(str(tiny), recipe(), tmp_path / "out").report
    again = parse_recipe((tmp_path / "out" / "llmcompress_recipe.yaml").read_text(), "saved")
    assert again.hash() == report.recipe_hash and again.model == str(tiny)
    saved = json.loads((tmp_path / "out" / "llmcompress_report.json").read_text())
    assert saved["recipe_hash"] == report.recipe_hash and saved["versions"]["torch"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmcompress import compress
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

class Dying(Silent):
    def step(self, text):
        if text == sys.argv[4]:
            os._exit(9)

compress(sys.argv[1], parse_recipe(Path(sys.argv[3]).read_text(), "test"), sys.argv[2], progress=Dying())
"""


def killed_at(python: WarmPython, moment: str, text: str, model: Path, folder: Path) -> None:
    """Compress in a process of its own that ends at a step of its progress, without any clean-up."""
    (folder / "recipe.yaml").write_text(text)
    killed = python.run(KILLED, model, folder / "out", folder / "recipe.yaml", moment)
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (folder / "out").exists() and (folder / "out.run").exists()


class Watching(Silent):
    """Notes what is computed."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.steps: list[str] = []

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        self.computed.append(text)

    def step(self, text: str) -> None:
        self.steps.append(text)


@pytest.mark.parametrize("passes", ["gptq: {scheme: int4_g16}", "awq: {scheme: int4_g16_asym}"])
def test_a_run_killed_at_a_block_and_resumed_equals_an_uninterrupted_one(
    passes: str, tiny: Path, tmp_path: Path, our_python: WarmPython
) -> None:
    text = GPTQ.replace("gptq: {scheme: int4_g16}", passes)
    whole = compress(str(tiny), recipe(text), tmp_path / "whole").report
    killed_at(our_python, "block 2/3", text, tiny, tmp_path)
    with pytest.raises(CompressError, match="other settings") as other:
        compress(str(tiny), recipe(text.replace("int4", "int8")), tmp_path / "out")
    assert "`fresh=True`" in other.value.fix
    watching = Watching()
    resumed = compress(str(tiny), recipe(text), tmp_path / "out", progress=watching).report
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert resumed.sites == whole.sites
    assert 0 < len(watching.computed) <= 11, "only the last block may be computed again"


STAGES = {
    "factors, then codes": "[{svd: {fraction: 0.3}}, {gptq: {scheme: int4_g16, on_indivisible: pad}}]",
    "decided widths, then codes": "[{width: {fraction: 0.25, score: activation}}, {gptq: {scheme: int4_g16}}]",
    "fewer blocks, then zeros": "[{depth: {count: 1}}, {wanda: {sparsity: 0.5}}]",
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("moment", ["first", "second"])
def test_a_run_of_several_stages_killed_in_any_and_resumed_equals_an_uninterrupted_one(
    name: str, moment: str, tiny: Path, tmp_path: Path, our_python: WarmPython
) -> None:
    text = NO_EVALUATION.replace("[{gptq: {scheme: int4_g16}}]", STAGES[name])
    watching = Watching()
    whole = compress(str(tiny), recipe(text), tmp_path / "whole", progress=watching).report
    steps = [step for step in watching.steps if step.startswith("stage")]
    killed_at(our_python, steps[0 if moment == "first" else -2], text, tiny, tmp_path)
    resumed = compress(str(tiny), recipe(text), tmp_path / "out").report
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    assert resumed.sites == whole.sites


def test_an_existing_output_is_kept_unless_told_otherwise(tiny: Path, tmp_path: Path) -> None:
    compress(str(tiny), recipe(), tmp_path / "out")
    before = weights_hash(tmp_path / "out")
    with pytest.raises(CompressError) as refused:
        compress(str(tiny), recipe(), tmp_path / "out")
    assert refused.value.code == "output.exists" and int(refused.value.exit_code) == 2
    assert weights_hash(tmp_path / "out") == before
    compress(str(tiny), recipe(GPTQ.replace("int4", "int8")), tmp_path / "out", overwrite=True)
    assert weights_hash(tmp_path / "out") != before


def test_a_failing_pass_leaves_finished_blocks_and_no_output(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = LinearSite.replace

    def failing(site: LinearSite, module: torch.nn.Module) -> None:
        if ".2." in site.name:
            raise KeyboardInterrupt
        replace(site, module)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LinearSite, "replace", failing)
        compress(str(tiny), recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.run" / "work").glob("*.safetensors"))) == 2


def test_an_error_in_the_middle_says_which_blocks_are_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = LinearSite.replace

    def failing(site: LinearSite, module: torch.nn.Module) -> None:
        if ".2." in site.name:
            raise CompressError("test.error", "something a user can fix")
        replace(site, module)

    monkeypatch.setattr(LinearSite, "replace", failing)
    with pytest.raises(CompressError) as stopped:
        compress(str(tiny), recipe(), tmp_path / "out")
    assert "2 finished blocks" in stopped.value.saved and "2 finished blocks" in str(stopped.value)
    assert "something a user can fix" in (tmp_path / "out.run" / "log.jsonl").read_text()


def test_activations_that_are_not_finite_stop_the_run_and_name_the_site(tiny: Path, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", hidden_size=128, intermediate_size=128, num_hidden_layers=3)
    huge = torch.full((128, 128), 3e38, dtype=torch.bfloat16)
    edit_tensors(folder / "model.safetensors", model__layers__1__self_attn__v_proj__weight=huge[:64])
    with pytest.raises(CompressError) as stopped:
        compress(str(folder), recipe(NO_EVALUATION), tmp_path / "out")
    assert stopped.value.code == "numerics.not-finite" and "layers.1." in stopped.value.where
    assert "blocks before 1" in stopped.value.saved and not (tmp_path / "out").exists()


def test_too_few_tokens_for_a_gram_matrix_degrade_and_say_so(tiny: Path, tmp_path: Path) -> None:
    text = NO_EVALUATION.replace("samples: 6, tokens: 48", "samples: 1, tokens: 8").replace(
        "int4_g16", "int4_g16, damping: 1.0e-12"
    )
    text += "\nguard: {windows: 0}\n"
    report = compress(str(tiny), recipe(text), tmp_path / "out").report
    assert report.degraded and "damping raised" in str(report.degraded[0].degraded)
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_the_plan_foretells_the_bytes_and_reads_no_weights(tiny: Path, tmp_path: Path) -> None:
    codes = ("gptq: {scheme: int4_g16}", "awq: {scheme: int4_g32_asym}", "rtn: {scheme: int8_channel_a8token}")
    factors = ("svd: {fraction: 0.3, round_to: 8}", "svd: {fraction: 0.3, ranks: uniform, round_to: 8}")
    for passes in (*codes, *factors):
        text = GPTQ.replace("gptq: {scheme: int4_g16}", passes)
        foretold = plan(str(tiny), recipe(text))
        compress(str(tiny), recipe(text), tmp_path / "out", overwrite=True)
        assert foretold.output_bytes == pytest.approx(bytes_on_disk(tmp_path / "out"), rel=0.02)


def test_inspect_shows_the_map(tiny: Path) -> None:
    text = json.dumps(inspect(str(tiny)))
    assert "self_attn.q_proj" in text and "lm_head" in text


def test_the_batch_size_changes_nothing_but_the_order_of_sums(tiny: Path, tmp_path: Path) -> None:
    large = compress(str(tiny), recipe(NO_EVALUATION), tmp_path / "a").report
    small = compress(str(tiny), recipe(NO_EVALUATION.replace("batch: 4", "batch: 1")), tmp_path / "b").report
    first_block = [row for row in large.sites if ".layers.0." in row.site]
    for one, other in zip(first_block, small.sites, strict=False):
        assert one.site == other.site and one.tokens == other.tokens
        assert one.error_before == pytest.approx(other.error_before, rel=1e-3)
