"""What a notebook user does: a model in memory, compressed in place, measured, saved, exported, pushed."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmcompress
from llmcompress import (
    CompressedModel,
    CompressError,
    ProgressEvent,
    compress,
    evaluate,
    footprint,
    inspect,
    load,
    plan,
)
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.model.site import LinearSite
from llmcompress.passes import GPTQ
from llmcompress.records.measurements import StageSeconds, WeightBytes
from tests.tiny_folder import write_tiny_llama

EVALUATE = {"perplexity": [{"source": "builtin:evaluation", "window": 48, "max_windows": 3}]}
RECIPE: dict[str, Any] = {
    "calibration": {"samples": 4, "tokens": 48},
    "passes": [GPTQ(scheme="int4_g16")],
    "evaluate": EVALUATE,
}
UNMEASURED = {**RECIPE, "evaluate": {}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True)


def in_memory(folder: Path, **options: Any) -> dict[str, Any]:
    """Model and tokenizer as arguments."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)


def numbers(made: CompressedModel) -> list[Any]:
    """All that was measured; seconds and the bytes of the dense file, which another program wrote, aside."""
    return [
        each.model_copy(update={"from_cache": False}) if hasattr(each, "from_cache") else each
        for each in made.report.measurements
        if not isinstance(each, StageSeconds) and not (isinstance(each, WeightBytes) and each.of == "dense")
    ]


def test_in_memory_equals_through_a_folder_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    saved = compress(str(tiny), RECIPE, tmp_path / "out")
    by_name, given = compress(str(tiny), RECIPE), compress(recipe=RECIPE, **in_memory(tiny))
    assert same_tensors(saved.model, by_name.model) and same_tensors(saved.model, given.model)
    assert numbers(saved) == numbers(by_name) == numbers(given)
    assert saved.report.sites == by_name.report.sites == given.report.sites
    assert given.report.bytes_dense == pytest.approx(saved.report.bytes_dense, rel=0.01)
    given.save(tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert by_name.report.bytes_compressed == bytes_on_disk(tmp_path / "out")


@pytest.mark.parametrize("pass_", ["rtn: {scheme: int4_g16}", "wanda: {sparsity: 0.5}", "width: {fraction: 0.25}"])
def test_it_is_saved_and_stock_transformers_loads_it(pass_: str, tiny: Path, tmp_path: Path) -> None:
    text = f"calibration: {{samples: 4, tokens: 48}}\npasses: [{{{pass_}}}]\nevaluate: {{perplexity: []}}"
    made = compress(recipe=text, **in_memory(tiny))
    made.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("the quick brown fox")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, made.model(ids).logits, rtol=0.05, atol=0.05)
    assert {"llmcompress_recipe.yaml", "llmcompress_report.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_model_in_memory_is_changed_in_place_and_stands_where_it_stood(tiny: Path) -> None:
    given = in_memory(tiny, dtype=torch.bfloat16)
    model: PreTrainedModel = given["model"].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    norm, tables = model.model.norm.weight, model.model.rotary_emb.inv_freq.clone()
    made = compress(recipe=UNMEASURED, **given)
    assert made.model is model and model.training
    assert norm is model.model.norm.weight and norm.dtype is torch.bfloat16 and norm.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad
    assert torch.equal(model.model.rotary_emb.inv_freq, tables)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    model.eval()
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_refusal_leaves_the_model_as_it_was(tiny: Path) -> None:
    given = in_memory(tiny, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in given["model"].state_dict().items()}
    with pytest.raises(CompressError) as refused:
        compress(recipe={**UNMEASURED, "passes": [GPTQ(scheme="int4_g128")]}, **given)
    assert "divi" in str(refused.value) and "in part" not in str(refused.value)
    after = given["model"].state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_an_error_in_the_middle_says_that_the_model_is_changed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, given = LinearSite.replace, in_memory(tiny)

    def failing(site: LinearSite, module: nn.Module) -> None:
        if ".1." in site.name:
            raise CompressError("test.error", "something a user can fix", fix="fix it")
        replace(site, module)

    monkeypatch.setattr(LinearSite, "replace", failing)
    with pytest.raises(CompressError, match="fix it; the model in memory is changed in part"):
        compress(recipe=UNMEASURED, **given)


def test_without_an_output_nothing_is_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for each in (tiny, None):
        compress(str(tiny), UNMEASURED) if each else compress(recipe=UNMEASURED, **in_memory(tiny))
    assert not list(tmp_path.iterdir())


def test_the_result_is_measured_again_as_the_report_has_it(tiny: Path) -> None:
    given = in_memory(tiny, dtype=torch.bfloat16)
    made = compress(recipe=RECIPE, **given)
    expected = made.report.quality[0].compressed.perplexity
    assert made.evaluate().perplexities[0].perplexity == expected
    assert evaluate(made, made.recipe.evaluate).perplexities[0].perplexity == expected
    assert evaluate(made.model, made.recipe.evaluate, tokenizer=made.tokenizer).perplexities[0].perplexity == expected
    assert made.model.dtype is torch.bfloat16
    assert isinstance(made.generate("the quick", max_new_tokens=3), str)


def test_questions_take_names_live_models_and_results(tiny: Path, tmp_path: Path) -> None:
    given, made = in_memory(tiny)["model"], compress(str(tiny), UNMEASURED, tmp_path / "out")
    assert inspect(given) == inspect(str(tiny)) == inspect(made)
    named, live = plan(str(tiny), UNMEASURED), plan(given, UNMEASURED)
    assert (live.sites, live.output_bytes) == (named.sites, named.output_bytes)
    sizes = [footprint(each) for each in (made, compress(str(tiny), UNMEASURED), tmp_path / "out")]
    assert len({each.parameters for each in sizes}) == 1 and len({each.bytes_on_disk for each in sizes}) == 1
    assert footprint(given).format == "plain"
    found = llmcompress.speed([made, given], context=4, new_tokens=2, repeats=1, skip=("limits", "energy"))
    assert len(found.rows) == 2 and all(row.speed.decode.median > 0 for row in found.rows)
    tasks = made.recipe.evaluate or [llmcompress.PerplexityTask(source="builtin:evaluation", window=48, max_windows=2)]
    loaded = load(tmp_path / "out", dtype=torch.float32)
    assert evaluate(loaded, tasks).perplexities[0].perplexity == pytest.approx(
        evaluate(made, tasks).perplexities[0].perplexity, rel=1e-5
    )


def test_saved_in_another_format_it_says_so_and_an_existing_folder_is_kept(tiny: Path, tmp_path: Path) -> None:
    made = compress(str(tiny), UNMEASURED)
    made.save(tmp_path / "plain", format="plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "format: plain" in (tmp_path / "plain" / "llmcompress_recipe.yaml").read_text()
    with pytest.raises(CompressError) as kept:
        made.save(tmp_path / "plain")
    assert kept.value.code == "output.exists" and "`overwrite=True`" in kept.value.fix
    made.save(tmp_path / "plain", overwrite=True)
    assert "quantization_config" in json.loads((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(CompressError, match="did you mean `plain`"):
        made.save(tmp_path / "x", format="plane")


def test_an_export_is_refused_by_what_cannot_hold_it_and_names_what_can(tiny: Path, tmp_path: Path) -> None:
    made = compress(
        str(tiny),
        {**UNMEASURED, "passes": [{"svd": {"fraction": 0.3}}]},
    )
    with pytest.raises(CompressError) as refused:
        made.export("bitsandbytes", tmp_path / "bnb")
    assert refused.value.code == "save.format" and "llmcompress" in refused.value.fix
    assert not (tmp_path / "bnb").exists()
    made.export("llmcompress", tmp_path / "ours")
    assert load(tmp_path / "ours").model
    with pytest.raises(CompressError, match="unknown exporter"):
        made.export("gguf9", tmp_path / "x")


def test_it_shows_itself_in_text_and_in_a_notebook(tiny: Path) -> None:
    made = compress(str(tiny), RECIPE)
    text, table = repr(made), made._repr_html_()
    assert "gptq" in text and "→" in text and "perplexity on builtin:evaluation" in text
    assert table.startswith("<table>") and str(tiny) in table and len(table) < 2000


def test_a_callback_is_told_everything_and_messages_are_logged(
    tiny: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    with caplog.at_level(logging.INFO, logger="llmcompress"):
        compress(
            str(tiny), {**RECIPE, "calibration": {"samples": 4, "tokens": 4000}}, tmp_path / "o", progress=events.append
        )
    stages = list(dict.fromkeys(event.stage for event in events))
    assert [each for each in ("load", "compress", "save") if each not in stages] == []
    blocks = [event for event in events if event.text.startswith("block") and not event.note]
    assert [(each.step, each.total) for each in blocks] == [(1, 2), (2, 2)]
    assert blocks[0].seconds_left is not None and blocks[1].seconds_left is None
    notes = [event.note for event in events if event.note]
    assert any("from 4000 to 64 tokens" in note for note in notes)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == notes


def test_a_bar_and_a_bad_progress(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress(str(tiny), UNMEASURED, progress="bar")
    assert "compress" in capsys.readouterr().err
    with pytest.raises(CompressError, match="cannot show progress"):
        compress(str(tiny), UNMEASURED, progress=3)


class Compiled(nn.Module):
    """As torch.compile wraps a model; importing the compiler takes longer than all tests here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


REFUSED = {
    "ddp": (lambda model: nn.DataParallel(model), "model.wrapped", "model.module"),
    "other": (lambda model: nn.Linear(2, 2), "model.other-class", "AutoModelForCausalLM"),
    "headless": (lambda model: model.model, "model.not-causal", "AutoModelForCausalLM"),
    "meta": (lambda model: model.to("meta"), "model.spread", "device_map"),
    "compiled": (lambda model: Compiled(model), "model.compiled", "_orig_mod"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_not_whole_are_refused_with_the_way_out(kind: str, tiny: Path) -> None:
    change, code, fix = REFUSED[kind]
    given = in_memory(tiny)
    with pytest.raises(CompressError) as refused:
        compress(recipe=UNMEASURED, model=change(given["model"]), tokenizer=given["tokenizer"])
    assert refused.value.code == code and fix in refused.value.fix


def test_what_is_compressed_already_or_has_no_tokenizer_is_refused(tiny: Path) -> None:
    given = in_memory(tiny)
    for arguments, code in (
        ({"model": given["model"]}, "model.no-tokenizer"),
        ({"model": str(tiny), "tokenizer": given["tokenizer"]}, "model.own-tokenizer"),
        ({"model": 3}, "model.kind"),
        ({**given, "offload": "always"}, "memory.needed"),
        ({"model": str(tiny), "offload": "always"}, "memory.needed"),
    ):
        with pytest.raises(CompressError) as refused:
            compress(recipe=UNMEASURED, **arguments)
        assert refused.value.code == code
    made = compress(recipe=UNMEASURED, **given)
    with pytest.raises(CompressError) as again:
        compress(made, UNMEASURED)
    assert again.value.code == "model.already-compressed"
    quantized = in_memory(tiny)
    quantized["model"].config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CompressError, match="already quantized: gptq"):
        compress(recipe=UNMEASURED, **quantized)


def test_weights_that_never_were_in_memory_are_read_from_the_folder(tiny: Path, tmp_path: Path) -> None:
    made = compress(str(tiny), UNMEASURED, tmp_path / "out", offload="always")
    resident = compress(str(tiny), UNMEASURED)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(made.model(ids).logits.float(), resident.model(ids).logits, rtol=0.05, atol=0.05)
    with pytest.raises(CompressError, match="with weight offloading"):
        made.save(tmp_path / "other", format="plain")


def test_a_recipe_of_a_model_in_memory_says_that_the_model_is_needed(tiny: Path, tmp_path: Path) -> None:
    compress(recipe=UNMEASURED, output=tmp_path / "out", **in_memory(tiny))
    with pytest.raises(CompressError) as refused:
        compress(None, tmp_path / "out" / "llmcompress_recipe.yaml", tmp_path / "again")
    assert refused.value.code == "model.in-memory"
    again = compress(recipe=tmp_path / "out" / "llmcompress_recipe.yaml", output=tmp_path / "again", **in_memory(tiny))
    assert (
        again.report.recipe_hash
        == json.loads((tmp_path / "out" / "llmcompress_report.json").read_text())["recipe_hash"]
    )


PUBLIC_FUNCTIONS = {name for name in llmcompress.__all__ if name.islower() and not name.startswith("_")}
LATER = {"export", "save", "push", "recover", "distill", "compare", "verify"}
"""Names that users will look for."""


def test_no_module_carries_the_name_of_a_public_function() -> None:
    modules = {found.name for found in pkgutil.iter_modules(llmcompress.__path__)}
    assert not modules & (PUBLIC_FUNCTIONS | LATER)
    importlib.import_module("llmcompress.pipeline")
    importlib.import_module("llmcompress.fixed_recipe")
    assert all(callable(getattr(llmcompress, name)) for name in PUBLIC_FUNCTIONS)
    found = [name for name in PUBLIC_FUNCTIONS if isinstance(getattr(llmcompress, name), ModuleType)]
    assert not found
