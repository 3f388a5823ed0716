"""Decisions written as a recipe make the same files, and a killed run does not repeat them."""

import hashlib
import json
from pathlib import Path

import pytest

from llmcompress import compress
from llmcompress.cli.main import main
from llmcompress.errors import CompressError
from llmcompress.fixed_recipe import allocate
from llmcompress.loading.load import load
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe, parse_recipe
from tests.families import tiny_config
from tests.tiny_folder import write_tiny_llama

TEXT = """
calibration: {samples: 6, tokens: 48, batch: 4}
passes: [{mixed_precision: {bits: 4.0, schemes: [int2_g16, int3_g16, int4_g16], quantizer: {gptq: {}}, samples: 4}}]
evaluate: {perplexity: []}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_llama(folder, hidden_size=64, intermediate_size=96, num_hidden_layers=3)


def recipe(text: str = TEXT) -> Recipe:
    return parse_recipe(text, "test")


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Watching(Silent):
    """Notes what is computed; may die after some block."""

    def __init__(self, dies_after: str = "") -> None:
        self.computed: list[str] = []
        self.dies_after = dies_after

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        self.computed.append(text)

    def note(self, text: str) -> None:
        self._die_of(text)

    def step(self, text: str) -> None:
        self._die_of(text)

    def _die_of(self, text: str) -> None:
        if self.dies_after and self.dies_after in text:
            raise RuntimeError("killed")


def test_the_recipe_that_was_decided_makes_the_same_files(tiny: Path, tmp_path: Path) -> None:
    report = compress(str(tiny), recipe(), tmp_path / "mixed").report
    decided = allocate(str(tiny), recipe())
    (settled,) = decided.passes
    assert "mixed_precision:" not in decided.to_yaml().partition("passes:")[2]
    again = compress(str(tiny), parse_recipe(decided.to_yaml(), "decided"), tmp_path / "again").report
    assert weights_hash(tmp_path / "mixed") == weights_hash(tmp_path / "again")
    assert report.sites == again.sites
    schemes = {row.site: row.scheme for row in report.sites}
    assert len(set(schemes.values())) > 1
    assert {site: settled.for_site(site).scheme for site in schemes} == schemes


def test_a_killed_run_goes_on_with_the_decision_it_had(tiny: Path, tmp_path: Path) -> None:
    compress(str(tiny), recipe(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        compress(str(tiny), recipe(), tmp_path / "out", progress=Watching("block 1/3"))
    watching = Watching()
    compress(str(tiny), recipe(), tmp_path / "out", progress=watching)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert watching.computed and not any(text.startswith("candidates") for text in watching.computed)


def test_a_run_killed_while_it_decides_has_what_it_measured(tiny: Path, tmp_path: Path) -> None:
    compress(str(tiny), recipe(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        compress(str(tiny), recipe(), tmp_path / "out", progress=Watching("bits per weight on average"))
    watching = Watching()
    compress(str(tiny), recipe(), tmp_path / "out", progress=watching)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert not any(text.startswith("candidates") for text in watching.computed)


def test_all_decisions_of_a_recipe_become_options_and_make_the_same_files(tiny: Path, tmp_path: Path) -> None:
    given = recipe(
        TEXT[: TEXT.index("passes")]
        + """
passes:
  - depth: {count: 1}
  - width: {fraction: 0.25, allocation: global, score: taylor_first}
  - wanda: {sparsity: 0.4, allocation: outliers, outlier_times: 3}
  - mixed_precision: {bits: 5.0, schemes: [int3_channel, int8_channel], quantizer: {gptq: {}}, samples: 4}
evaluate: {perplexity: []}
"""
    )
    compress(str(tiny), given, tmp_path / "out")
    decided = allocate(str(tiny), given, device="cpu")
    compress(str(tiny), parse_recipe(decided.to_yaml(), "decided"), tmp_path / "again")
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "again")
    depth, width, wanda, quantizer = decided.passes
    assert depth.blocks and width.fraction == 0 and wanda.allocation == "uniform"  # type: ignore[attr-defined]
    assert all(each.overrides for each in (width, wanda, quantizer))  # type: ignore[attr-defined]


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_experts_are_taken_apart_and_measured_as_the_recipe_says(experts: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config("mixtral")
    config.vocab_size = 288
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float16)
    folder = write_tiny_llama(tmp_path / "model")  # for its tokenizer
    model.save_pretrained(folder)
    given = recipe(
        TEXT.replace("batch: 4", f"batch: 4, experts: {experts}").replace(
            "{gptq: {}}", "{gptq: {}}, sensitivity: output"
        )
    )
    report = compress(str(folder), given, tmp_path / "out").report
    decided = allocate(str(folder), given, device="cpu")
    compress(str(folder), decided, tmp_path / "again")
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "again")
    schemes = {row.site: row.scheme for row in report.sites}
    assert any(".experts." in site for site in schemes)
    assert {site: decided.passes[0].for_site(site).scheme for site in schemes} == schemes  # type: ignore[attr-defined]


def test_passes_before_the_decision_are_applied_first(tiny: Path) -> None:
    folded = TEXT.replace("passes: [", "passes: [smoothquant, ")
    decided = allocate(str(tiny), recipe(folded))
    assert [type(each).__name__ for each in decided.passes] == ["SmoothQuant", "GPTQ"]


def test_a_recipe_without_anything_to_decide_is_refused(tiny: Path) -> None:
    with pytest.raises(CompressError, match="no pass of the recipe makes a decision"):
        allocate(str(tiny), recipe("passes: [rtn: {scheme: int4_g16}]"))


def test_the_command_writes_a_recipe_that_can_be_read_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed.yaml").write_text(TEXT)
    given = ["allocate", str(tiny), "--recipe", str(tmp_path / "mixed.yaml")]

    def run(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            main([*given, *more])
        code = exit_.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().out

    code, printed = run()
    assert code == 0
    decided = parse_recipe(printed, "printed")
    assert decided.passes[0].overrides  # type: ignore[attr-defined]
    assert run("-o", str(tmp_path / "decided.yaml")) == (0, f"{tmp_path / 'decided.yaml'}\n")
    assert (tmp_path / "decided.yaml").read_text() == printed
    assert run("-o", str(tmp_path / "decided.yaml"))[0] == 2
    code, printed = run("--json", "--set", "passes.mixed_precision.bits=3.5")
    assert code == 0 and json.loads(printed)["passes"]


def test_new_biases_and_codebooks_load_with_our_plugin(tiny: Path, tmp_path: Path) -> None:
    import torch

    for name, passes in {
        "biases": "bias_correction: {scheme: int3_g16, new_biases: true, quantizer: {rtn: {}}}",
        "codebooks": "cmpq: {bits: 8.0}",
    }.items():
        text = TEXT[: TEXT.index("passes")] + f"passes: [{{{passes}}}]\nevaluate: {{perplexity: []}}\n"
        report = compress(str(tiny), recipe(text), tmp_path / name).report
        model, _ = load(str(tmp_path / name), dtype=torch.float32)
        module = model.get_submodule(report.sites[0].site)
        assert (module.bias is not None) == (name == "biases")
        assert report.bytes_compressed < report.bytes_dense
