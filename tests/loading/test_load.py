"""What is loaded is what was saved: nothing random, nothing changed, nothing left switched off."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmcompress.errors import CompressError
from llmcompress.exporters.save import save_model
from llmcompress.loading.load import load, load_for_compression, load_model, load_tokenizer
from llmcompress.loading.quiet import quiet_transformers
from llmcompress.loading.source import Source
from tests.tiny_folder import SENTENCE, edit_json, edit_tensors, write_tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@torch.no_grad()
def test_logits_are_those_of_the_stock_loader(folder):
    loaded = load_for_compression(Source(folder, "tiny"))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([loaded.tokenizer.encode(SENTENCE)])
    assert_close(loaded.model(ids).logits, stock(ids).logits, rtol=0, atol=0)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.preflight.storage_dtype is torch.bfloat16
    assert loaded.model.config.use_cache == stock.config.use_cache


def test_the_dtype_asked_for_is_the_dtype_loaded(folder):
    model = load_model(Source(folder, "tiny"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a7_nan_and_inf_are_refused_with_tensor_file_and_count(folder, value):
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    weight = load_file(file)[UP]
    weight.view(-1)[3:6] = value
    edit_tensors(file, **{UP: weight})
    with pytest.raises(CompressError) as caught:
        load_for_compression(Source(folder, "tiny"))
    assert caught.value.code == "model.not-finite"
    assert caught.value.where == f"{UP} in model.safetensors: 3 of {weight.numel()} values"


def test_a16_contradicting_head_is_refused_and_a_copy_is_tied(tmp_path):
    from safetensors.torch import load_file

    folder = write_tiny_llama(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder / "model.safetensors", lm_head__weight=embedding.clone())
    loaded = load_for_compression(Source(folder, "tied"))
    assert loaded.preflight.contents.stored_twice == ("model.embed_tokens.weight", "lm_head.weight")
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    edit_tensors(folder / "model.safetensors", lm_head__weight=embedding + 1)
    with pytest.raises(CompressError) as caught:
        load_for_compression(Source(folder, "tied"))
    assert caught.value.code == "model.contradicting-head"
    assert "lm_head.weight" in caught.value.where and '"tie_word_embeddings": false' in caught.value.fix


def test_a21_nothing_is_written_back_to_the_tokenizer(folder):
    edit_json(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert load_tokenizer(Source(folder, "tiny")).pad_token is None
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a23_the_repaired_generation_config_is_the_one_that_is_saved(folder, tmp_path):
    edit_json(folder / "generation_config.json", do_sample=False, temperature=0.6)
    model = load_for_compression(Source(folder, "tiny")).model
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "temperature" not in saved or saved["temperature"] in (None, 1.0)


@torch.no_grad()
def test_b4_a_code_key_has_no_effect_on_what_is_computed(folder, pristine):
    edit_json(folder / "config.json", _attn_implementation_internal="org/repo", _experts_implementation="org/repo")
    changed, plain = (load_for_compression(Source(path, "tiny")).model for path in (folder, pristine))
    assert changed.config._attn_implementation == plain.config._attn_implementation == "sdpa"


def test_a_finished_dense_model_generates(folder):
    model, tokenizer = load(folder)
    assert next(model.parameters()).dtype is torch.bfloat16
    ids = torch.tensor([tokenizer.encode("the quick")])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_a_finished_model_with_a_missing_tensor_is_refused(folder):
    edit_tensors(folder / "model.safetensors", **{Q: None})
    with pytest.raises(CompressError) as caught:
        load(folder)
    assert caught.value.code == "model.missing-tensor" and Q in caught.value.where


@pytest.mark.parametrize(
    "lost", [["weight_packed"], ["weight_scale"], ["weight_packed", "weight_scale", "weight_shape"]]
)
def test_a_finished_quantized_model_with_a_missing_tensor_is_refused(tmp_path, pristine, lost):
    folder = _quantized(tmp_path, pristine)
    site = Q.removesuffix(".weight")
    assert load(folder).model is not None
    edit_tensors(folder / "model.safetensors", **{f"{site}.{part}": None for part in lost})
    with pytest.raises(CompressError) as caught:
        load(folder)
    assert caught.value.code == "model.missing-tensor" and site in caught.value.where


def _quantized(tmp_path: Path, pristine: Path) -> Path:
    """The tiny model as int4 with one scale per channel, written by the project's own exporter."""
    from llmcompress.modules.quant_linear import QuantLinear
    from llmcompress.modules.scheme import named_scheme
    from llmcompress.numerics.grid import round_to_codes
    from llmcompress.numerics.ranges import fit

    folder = tmp_path / "quantized"
    model = load_model(Source(pristine, "tiny"), dtype=torch.float32)
    scheme = named_scheme("int4_channel")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight.detach()
            fitted = fit(weight, scheme.weights, scale_dtype=torch.bfloat16)
            module = QuantLinear.from_fitted(scheme, round_to_codes(weight, fitted), fitted, None)
            setattr(layer.self_attn, name, module)
    save_model(model, folder, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(pristine / name, folder)
    return folder


def test_silence_ends_with_its_context(capfd):
    logging.set_verbosity(logging.INFO)
    logging.enable_progress_bar()
    with quiet_transformers():
        logging.get_logger("transformers").warning("not shown")
        warnings.warn("not shown", stacklevel=1)
    assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with quiet_transformers():
        pass
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
    assert "not shown" not in "".join(capfd.readouterr())


def test_loading_says_nothing_on_the_terminal(folder, capfd):
    load_for_compression(Source(folder, "tiny"))
    assert "".join(capfd.readouterr()) == ""
