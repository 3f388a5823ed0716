"""Who reads and writes the residual stream is found on every family; another basis changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.model.embedding_norm import bake_embedding_norm
from llmcompress.model.narrow import narrow
from llmcompress.model.norms import norm_form
from llmcompress.model.residual import Port
from llmcompress.model.residual_probe import find_residual
from llmcompress.model.rotation import make_rotatable
from llmcompress.numerics.basis import random_basis, zero_mean_frame
from tests.families import FAMILIES, tiny_model, tiny_tokens
from tests.reference.slicing import project_what_is_written

REFUSED = {
    "gemma2": "post_attention_layernorm.weight",  # norms on what is added: their gains stand on single channels
    "olmo2": "post-norm",  # no norm before, only after
}


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens(family)).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def names(ports: object) -> set[tuple[str, int]]:
    return {(port.parameter, port.axis) for port in ports}  # type: ignore[attr-defined]


def test_everything_that_meets_the_stream_of_llama_is_found():
    residual = find_residual(tiny_model("llama_gqa"))
    assert (residual.width, residual.centred) == (64, False)
    assert names(w.port for w in residual.outside_blocks.writers) == {("model.embed_tokens.weight", 1)}
    assert names(residual.outside_blocks.readers()) == {("lm_head.weight", 1)}
    _, ports = residual.blocks[0]
    first, second = ports.norms
    assert (first.name, first.stage, second.name, second.stage) == (
        "input_layernorm",
        0,
        "post_attention_layernorm",
        1,
    )
    assert names(first.readers) == {(f"self_attn.{name}_proj.weight", 1) for name in "qkv"}
    assert names(second.readers) == {(f"mlp.{name}_proj.weight", 1) for name in ("gate", "up")}
    assert {(w.port.parameter, w.port.axis, w.stage) for w in ports.writers} == {
        ("self_attn.o_proj.weight", 0, 0),
        ("mlp.down_proj.weight", 0, 1),
    }


def test_transposed_weights_biases_and_positions_of_gpt2_are_found():
    residual = find_residual(tiny_model("gpt2"))
    assert residual.centred
    assert names(w.port for w in residual.outside_blocks.writers) == {
        ("transformer.wte.weight", 1),
        ("transformer.wpe.weight", 1),
    }
    assert names(w.port for w in residual.blocks[0][1].writers) == {
        ("attn.c_proj.weight", 1),
        ("attn.c_proj.bias", 0),
        ("mlp.c_proj.weight", 1),
        ("mlp.c_proj.bias", 0),
    }


def test_routers_and_experts_read_the_same_norm():
    ports = find_residual(tiny_model("mixtral")).blocks[0][1]
    readers = {port.parameter.split(".")[1] for port in ports.norms[1].readers}
    assert readers == {"gate", "experts"}


def test_blocks_with_attention_and_ffn_side_by_side_have_one_stage():
    for family, stages in {"falcon": 1, "gpt_neox": 1, "phi": 1, "gpt_neox_sequential": 2, "falcon_old": 2}.items():
        assert find_residual(tiny_model(family)).blocks[0][1].stages == stages, family


@pytest.mark.parametrize("family", REFUSED)
def test_norms_on_what_is_added_are_refused_by_name(family):
    with pytest.raises(CompressError, match=r"(?s)cannot be rotated") as error:
        find_residual(tiny_model(family))
    assert REFUSED[family] in str(error.value)


def test_a_gain_on_what_is_added_is_refused():
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.rand(64))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = Scaled(block.mlp)
    with pytest.raises(CompressError, match=r"mlp\.scale"):
        find_residual(model)


def test_a_reader_that_experiments_cannot_see_is_caught_by_the_mirror(monkeypatch):
    model = tiny_model("llama")
    residual = find_residual(model)
    norm = residual.blocks[0][1].norms[0]
    object.__setattr__(norm, "readers", tuple(port for port in norm.readers if "v_proj" not in port.parameter))
    with pytest.raises(CompressError, match="could not be identified"):
        make_rotatable(model, residual, constants="bias", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("constants", ["bias", "mean"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_a_mirrored_stream_leaves_the_logits_and_plain_norms(family, constants):
    model = tiny_model(family)
    dense = logits(model, family)
    bake_embedding_norm(model)
    residual = find_residual(model)
    make_rotatable(model, residual, constants=constants, generator=torch.Generator().manual_seed(0))
    assert_same(logits(model, family), dense)
    assert not model.config.tie_word_embeddings
    for name, ports in residual.blocks:
        for norm in ports.norms:
            weight = model.get_submodule(f"{name}.{norm.name}").weight
            assert bool((weight == 1 - norm.form.offset).all())


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3_moe", "opt", "gpt_neox", "falcon_mqa", "cohere", "phi", "gpt2"])
def test_a_narrow_model_computes_what_the_wide_one_does_with_the_other_directions_masked(family):
    """Norms still divide by the width that was: also LayerNorm, whose mean stays zero in the narrow stream."""
    wide, small = tiny_model(family), tiny_model(family)
    residual = find_residual(wide)
    centred = int(residual.centred)
    inside = random_basis(64 - centred, torch.Generator().manual_seed(3))[:, : 40 - centred]
    kept_DK = zero_mean_frame(64).T @ inside if centred else inside
    for model in (wide, small):
        make_rotatable(model, residual, constants="mean", generator=torch.Generator().manual_seed(0))
    project_what_is_written(wide, residual, kept_DK)
    narrow(small, residual, kept_DK, {})
    assert_same(logits(small, family), logits(wide, family))
    assert small.get_input_embeddings().weight.shape[1] == 40


def test_forms_of_norms_are_measured():
    class Centred(nn.Module):
        weight = None

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, (16,), eps=1e-5)

    class OnePlus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16) - 0.5)
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)

    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x / x.abs().sum(-1, keepdim=True)).softmax(-1)

    centred, one_plus = norm_form(Centred(), 16), norm_form(OnePlus(), 16)
    assert centred is not None and centred.centred and centred.epsilon == pytest.approx(1e-5, rel=1e-2)
    assert one_plus is not None and (one_plus.centred, one_plus.offset, one_plus.epsilon) == (False, 1.0, 1e-6)
    assert norm_form(Softmax(), 16) is None
    assert Port("mlp.fc.weight", 0).owner == "mlp.fc"
