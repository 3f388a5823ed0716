"""The real model's folder, its trials and their tables: the same programs on a tiny model and on made-up numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
import real_model
import real_trials
import torch
import yaml
from study import Bench, Study, calibration_draw, rounded_bytes, stored_bytes, unused_text
from tables import paired, real
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmcompress.calibration.sources import paragraph_hashes
from llmcompress.evaluation.bootstrap import estimate
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import write_tiny_llama

MADE = {"versions": {"torch": "2.13.0", "transformers": "5.1"}, "machine": {"cpu": "a processor", "cores": "2"}}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A tiny model, calibration and measured texts of other words."""
    words = ["fox", "dog", "quick", "brown", "lazy", "model", "reads", "small", "over", "learns"]
    generator = torch.Generator().manual_seed(0)

    def write(name: str, count: int) -> Path:
        drawn = torch.randint(len(words), (count, 12), generator=generator).tolist()
        lines = [" ".join(words[index] for index in line) for line in drawn]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return Study(
        write_tiny_llama(tmp_path / "model"),
        write("calibration.txt", 60),
        {"one": write("one.txt", 12), "two": write("two.txt", 12)},
        {"valid": write("valid.txt", 12)},
        tmp_path / "cache",
        samples=4,
        tokens=32,
        window=32,
        windows=3,
        validation_windows=2,
    )


def as_in_gguf(weight_OI: Tensor, heads: int) -> Tensor:
    """How llama.cpp's converter orders the rows of a query or key projection."""
    outputs, inputs = weight_OI.shape
    return weight_OI.reshape(heads, 2, outputs // heads // 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)


def test_a_llama_that_went_through_gguf_names_and_orders_is_the_same_model(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().float()
    ours = {place: name for name, place in real_model.PARTS.items()}
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for number, block in enumerate(model.model.layers):
        for place, name in ours.items():
            weight = block.get_submodule(place).weight
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            tensors[f"blk.{number}.{name}.weight"] = as_in_gguf(weight, heads) if heads else weight
    letters = sorted(real_model.pre_tokenizers.ByteLevel.alphabet())
    fields = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["<unk>", "<start>", "<end>", *letters, "in"],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * len(letters), 1],
        "tokenizer.ggml.merges": ["i n"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    with torch.no_grad():
        real_model.write_model(tmp_path / "made", fields, {name: each.detach() for name, each in tensors.items()})
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer("in 12<end>").input_ids[:2] == [1, 259] and tokenizer("<end>").input_ids == [1, 2]
    assert tokenizer.decode(tokenizer("in 12").input_ids, skip_special_tokens=True) == "in 12"


def test_a_file_with_other_contents_is_refused(tmp_path):
    (tmp_path / "file").write_text("other")
    with pytest.raises(ValueError, match="SHA-256"):
        real_model.check(tmp_path / "file", real_model.FILE_SHA256)


def test_a_trial_knows_the_losses_of_every_window_and_the_dense_model_is_no_distance_from_itself(study):
    bench = Bench(study)
    model, trial = bench.compress([], 0)
    found = bench.measure(model, ["one", "valid"])
    assert [len(each["nats"]) for each in found.values()] == [3, 2]
    assert all(abs(each) < 1e-3 for each in found["one"]["kl"])
    dense = bench.text("one")
    expected = -sum(float(window.logprob_P.sum()) for window in dense.windows)
    assert sum(found["one"]["nats"]) == pytest.approx(expected, rel=1e-5)
    rounded, coarse = bench.compress([{"rtn": {"scheme": "int2_g16"}}], 0)
    assert min(bench.measure(rounded, ["one"])["one"]["kl"]) > 0
    assert coarse["parameters"] == trial["parameters"]
    assert stored_bytes(rounded) < stored_bytes(model) == sum(2 * each.numel() for each in model.parameters())


def test_dense_weights_that_codes_stand_for_are_counted_as_codes(study):
    bench = Bench(study)
    model, _ = bench.compress([{"rtn": {"scheme": "int2_g16"}}], 0)
    dense = dict(study.loaded().model.named_parameters())
    found = {
        f"{name}.weight": module.dense_weight().float()
        for name, module in model.named_modules()
        if hasattr(module, "dense_weight")
    }
    assert found and rounded_bytes(dense, found, bits=2, group=16) == stored_bytes(model)


def test_no_draw_has_seen_the_text_that_is_left_of_the_calibration_file(study):
    used = calibration_draw(study.calibration, study.loaded(), 2, 32, 0)[1]
    rest = paragraph_hashes([unused_text(study.calibration, used)])
    assert rest and used and not rest & used
    assert rest | used == paragraph_hashes([study.calibration.read_text()])


def test_every_row_is_a_recipe_or_names_a_peer_and_all_draws_of_one_come_before_the_next():
    rows = real_trials.read_rows(real_trials.HERE / "real_rows.yaml")
    for row in rows:
        assert (row.who == "ours") != bool(row.peer and (real_trials.HERE / "peers" / row.script).exists())
        for setting in row.settings if row.passes else ():
            passes = json.loads(json.dumps(row.passes).replace("{scheme}", setting.partition(",")[0]))
            assert len(parse_recipe(yaml.safe_dump({"passes": passes}), "a row").passes) == len(passes)
    jobs = list(real_trials.missing(rows, [], [], peers=True))
    assert [job.draw for job in jobs] == sorted(job.draw for job in jobs)
    assert not [job for job in real_trials.missing(rows, [], ["ours"], peers=True) if job.row.who != "ours"]
    assert len(list(real_trials.missing(rows, [jobs[0].key], [], peers=True))) == len(jobs) - 1


def test_trials_are_found_again_and_those_of_another_protocol_are_not_mixed_in(study, tmp_path):
    bench, path = Bench(study), tmp_path / "real-tiny.json"
    model, trial = bench.compress([], 0)
    key = {"setting": "dense", "who": "ours", "method": "dense", "draw": 0, "candidate": True}
    real_trials.Results(path, study).add(bench, {**key, **trial, "texts": bench.measure(model, ["one"])})
    again = real_trials.Results(path, study)
    assert [each["setting"] for each in again.trials] == ["dense"]
    study.texts["one"].write_text("another text")
    with pytest.raises(click.UsageError, match="text_sha256"):
        real_trials.Results(path, study)


def test_the_error_of_a_difference_is_that_of_the_evaluation():
    windows = [torch.randn(count, generator=torch.Generator().manual_seed(count)) for count in (5, 9, 7, 3)]
    sums, tokens = [float(each.double().sum()) for each in windows], [len(each) for each in windows]
    expected = estimate(windows)
    assert paired.estimate(sums, tokens) == pytest.approx((expected.mean, expected.standard_error))


def made_up() -> dict[str, Any]:
    """Two windows of ten tokens on every text; `b` is better on the validation text and worse on the other."""

    def trial(setting: str, who: str, method: str, nats: float, valid: float, draw: int = 0) -> dict[str, Any]:
        texts = {"one": {"nats": [20 + nats, 30 + nats], "kl": [nats, nats]}}
        if who == "ours":
            texts["valid"] = {"nats": [valid, valid], "kl": [0, 0]}
        return {
            "setting": setting, "who": who, "method": method, "draw": draw, "candidate": who == "ours", "texts": texts,
            "bytes": 10_000_000, "cpu_seconds": 5.0, "peak_bytes": 2e9 if who == "ours" else None, "commit": "abc",
            **({} if who == "ours" else {"versions": {"peer": "1.2"}}),
        }  # fmt: skip

    return {
        **MADE,
        "model": "m",
        "protocol": {
            "texts": ["one"], "validation": ["valid"], "samples": 16, "tokens": 512, "window": 11, "bos": True,
        },
        "tokens": {"one": [10, 10], "valid": [10, 10]},
        "trials": [
            trial("dense", "ours", "dense", 0, 20),
            trial("int3_g64", "ours", "a", 2, 23),
            trial("int3_g64", "ours", "b", 4, 22),
            trial("int3_g64", "ours", "b", 6, 22, draw=1),
            trial("int3_g64", "peer", "c", 8, 0),
        ],
    }  # fmt: skip


def test_methods_are_chosen_on_validation_text_and_compared_in_pairs():
    facts = made_up()
    rows = paired.methods(facts)
    best = paired.chosen(rows, "int3_g64", facts)
    assert best is not None and best.name == "b" and len(best.trials) == 2
    apart = paired.difference(*paired.on_common_draws(rows[-1], best), facts, ["one"])
    assert apart == pytest.approx((0.4, 0.0)), "what windows and draws share drops out"
    assert paired.between_draws(best, best, facts, ["one"]) == [0, 0]
    assert paired.ratio(best, rows[0], facts, ["one"]).mean == pytest.approx(math.exp(0.5))


def test_tables_state_the_protocol_and_mark_the_row_that_was_chosen():
    shown = real.everything(made_up())
    assert "dense perplexity 12.18 on one (20 tokens); non-overlapping windows of 11, each with BOS" in shown
    low, high = (math.exp(2.5 + nats / 10) for nats in (4, 6))
    assert f"| ours | **b** | 10 | {(low + high) / 2:.2f} ({low:.2f}–{high:.2f}), ×1.649 ± 0.000 |" in shown
    assert "| peer | c | 10 | 27.11, ×2.226 ± 0.000 | 0.800 ± 0.000 | +0.400 ± 0.000 | 5 | – | 1 |" in shown
    assert "Peers: peer 1.2. Measured at commit abc." in shown
    assert "| `int3_g64` | peer: c | 10 | 27.11, ×2.23 ± 0.00 | 0.800 |" in real.short(made_up())
