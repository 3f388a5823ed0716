"""onnxruntime-genai: our codes are in its builder's graph bit for bit, and it computes what PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai
import pytest
import torch
from torch import nn

from llmcompress import compress
from llmcompress.errors import CompressError
from llmcompress.exporters.base import Writing
from llmcompress.exporters.config import spelled_for_both
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.onnx_file import DATA
from llmcompress.exporters.onnx_genai import OnnxGenaiExporter, config_problem
from llmcompress.exporters.onnx_genai_builder import CONFIG, Rows
from llmcompress.exporters.onnx_genai_matrices import Matrices, outputs_of
from llmcompress.model_export import export
from llmcompress.modules.expression import Chain, Opaque, Sum
from llmcompress.modules.expression_leaves import Dense
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.onnxruntime_genai import SEQUENCES, OnnxRuntimeGenaiRunner
from llmcompress.runners.torch_runner import TorchRunner
from tests.exporters.gguf_models import tiny, tiny_quantized, tokenizer
from tests.formats.test_layouts import form

CPU = torch.device("cpu")
IDS_BT = torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(0))
EXACT = {"onnx_genai": {"accuracy_level": 0}}


@pytest.fixture(scope="module")
def shared_table(tmp_path_factory):
    """A tied Llama with biases, its linears in 4 bits and one table of 8 bits for embedding and head."""
    passes = [{"rtn": {"scheme": "int4_g32"}}, "embeddings"]
    made = compress(tiny("llama_tied_biased"), {"passes": passes, "evaluate": {}}, tokenizer=tokenizer())
    folder = tmp_path_factory.mktemp("genai") / "out"
    return made.model, folder, export(made, "onnx_genai", folder, options=EXACT, run=False)["onnx_genai"]


@pytest.fixture(scope="module")
def different_matrices(tmp_path_factory):
    """A Qwen whose q, k and v have different grids, beside low-rank factors and an ordinary linear."""
    model = tiny_quantized("qwen2", ["int4_g32_asym", "int8_channel", "int3_g48", "int2_g32"])
    mlp = model.model.layers[1].mlp
    generator = torch.Generator().manual_seed(1)
    left_OR, right_RI = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((96, 8), (8, 64)))
    mlp.up_proj = LowRankLinear.from_factors(left_OR / 8, right_RI / 8, None).eval()
    mlp.gate_proj = nn.Linear(64, 96, bias=False)
    mlp.gate_proj.weight.data = torch.randn(96, 64, generator=generator).bfloat16().float() / 8
    folder = tmp_path_factory.mktemp("genai") / "out"
    report = export(model.eval(), "onnx_genai", folder, tokenizer=tokenizer(), options=EXACT, run=False)["onnx_genai"]
    return model, folder, report


@pytest.mark.parametrize("made", ["shared_table", "different_matrices"])
def test_every_tensor_is_in_the_graph_and_it_computes_the_same(made: str, request) -> None:
    model, folder, report = request.getfixturevalue(made)
    assert all(row.is_same for row in report.read_back)
    coded = sum(row.values for row in report.read_back if row.codes_differing is not None)
    assert coded == sum(site.outputs * site.inputs for site in contents_in(model, torch.bfloat16).sites)
    assert report.bytes == sum((folder / name).stat().st_size for name in ("model.onnx", DATA))
    with opened(folder) as runner, TorchRunner(model) as reference:
        assert (runner.vocabulary, runner.max_positions) == (288, 128)
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=1e-4)
        prompts = [[5, 9, 4, 7, 11, 3], [8], [6, 5, 4]]
        wanted = reference.generate(prompts, max_new_tokens=6)
        assert runner.generate(prompts, max_new_tokens=6) == wanted
        stop = {wanted[0][2]}
        given = {"max_new_tokens": 6, "stop": stop}
        assert runner.generate(prompts, **given) == reference.generate(prompts, **given)
        steps = [torch.stack(list(each.stream(IDS_BT, max_new_tokens=20)), 1) for each in (runner, reference)]
        assert torch.equal(*steps)
        work = runner.work(IDS_BT)
        assert work is not None and work.cache_bytes == reference.work(IDS_BT).cache_bytes > 0


def test_more_sequences_than_its_generators_take_are_run_in_parts(shared_table) -> None:
    model, folder, _ = shared_table
    ids_BT = torch.randint(3, 280, (SEQUENCES + 1, 6), generator=torch.Generator().manual_seed(1))
    with opened(folder) as runner, TorchRunner(model) as reference:
        torch.testing.assert_close(runner.logits(ids_BT), reference.logits(ids_BT), rtol=0, atol=1e-4)
        steps = [torch.stack(list(each.stream(ids_BT, max_new_tokens=3)), 1) for each in (runner, reference)]
    assert torch.equal(*steps)


def test_tokens_that_end_a_text_for_its_own_loop_do_not_end_ours(shared_table, tmp_path: Path) -> None:
    model, folder, _ = shared_table
    with TorchRunner(model) as reference:
        wanted = torch.stack(list(reference.stream(IDS_BT, max_new_tokens=8)), 1)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / CONFIG).read_text())
    config["model"] |= {"eos_token_id": wanted[:, 2].tolist(), "pad_token_id": 5}
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(json.dumps(config))

    class EndsEarly(OnnxRuntimeGenaiRunner):
        _end = int(wanted[1, 4])

    for kind in (OnnxRuntimeGenaiRunner, EndsEarly):
        with kind.open(str(tmp_path), device=CPU, dtype=torch.float32) as runner:
            assert torch.equal(torch.stack(list(runner.stream(IDS_BT, max_new_tokens=8)), 1), wanted)


def opened(folder: Path):
    return RUNNERS["onnxruntime_genai"].open(str(folder), device=CPU, dtype=torch.float32)


def test_its_own_tokenizer_reads_the_folder_and_its_readme_says_how(shared_table) -> None:
    folder, ours = shared_table[1], tokenizer()
    own = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    for text in ("the quick brown fox", " two  spaces, digits 2024", "line\n\nline"):
        assert list(own.encode(text)) == ours(text)["input_ids"]
    assert OnnxGenaiExporter.how_to_run in (folder / "README.md").read_text()
    assert len(OnnxGenaiExporter.how_to_run.splitlines()) == 5


def test_codes_that_the_file_does_not_hold_are_found(shared_table, tmp_path: Path) -> None:
    model, folder, _ = shared_table
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    content = bytearray((folder / DATA).read_bytes())
    content[5] ^= 1
    (tmp_path / DATA).write_bytes(content)
    rows = OnnxGenaiExporter(accuracy_level=0).read_back(model, tmp_path, Writing(torch.float32))
    assert len([row for row in rows if not row.is_same]) == 1


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=CONFIG):
        opened(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))
    with pytest.raises(CompressError, match="cannot load it"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "kind `dynamic`"),
        ("qwen3", {}, "multiple of 16, and these have 24"),
        ("phi3", {}, "LongRoPE"),
        ("gemma3", {}, "`gemma3_text` is none of them"),
    ],
)
def test_a_config_whose_graph_was_not_compared_is_refused(name: str, changes: dict, reason: str) -> None:
    assert reason in str(config_problem(spelled_for_both(tiny(name, **changes).config)))
    assert config_problem(spelled_for_both(tiny("llama").config)) is None


def test_parts_and_neighbours_are_the_rows_of_the_matrices() -> None:
    one, two = form("int4_g8", (8, 48), torch.float32), form("int4_g8", (4, 48), torch.float32, bias=False)
    dense = Dense(torch.randn(6, 48))
    chain = Chain((Dense(torch.randn(5, 48)), Dense(torch.randn(8, 5), bias=torch.randn(8))))
    matrices = Matrices({"a": one, "b": two, "c": dense, "d": chain, "e": Sum((chain, one)), "f": Opaque("nothing")})
    name = matrices.name_of([Rows("b", 0, 4), Rows("a", 2, 8)])
    assert name == "b+a[2:8]" and matrices.linears_in([name, "c"]) == {"a", "b", "c"}
    found, x = matrices.form_called(name), torch.randn(3, 48)
    assert found is not None
    torch.testing.assert_close(found(x), torch.cat([two(x), one(x)[:, 2:8]], 1))
    for source in ("a", "c", "d", "e"):
        whole = matrices.forms[source]
        part = outputs_of(whole, slice(1, 4))
        assert part is not None
        torch.testing.assert_close(part(x), whole(x)[:, 1:4])
        assert matrices.form_called(matrices.name_of([Rows(source, 0, whole.shape[0])])) is whole
    assert outputs_of(matrices.forms["f"], slice(1, 4)) is None
    assert matrices.form_called("a+c") is None and matrices.form_called("c+c").shape == (12, 48)
