"""The model card says what the reports say, names no place on this computer, and leaves a user's own text alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from llmcompress import compress
from llmcompress.compressed_model import CompressedModel
from llmcompress.errors import CompressError
from llmcompress.hub_upload import preview, push
from llmcompress.publishing.card_merge import BEGIN, END, merged_card
from llmcompress.publishing.destinations import HubRepository
from tests.hub.conftest import RECIPE
from tests.hub.server import HubDouble

NAME = "me/tiny-w4"


def front_matter(card: str) -> dict[str, object]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def card_of(made: CompressedModel, **settings: object) -> str:
    assert made.folder is not None
    return preview([made.folder], HubRepository.model_validate({"repository": NAME, **settings})).card


def test_the_front_matter_is_what_the_hub_reads(hub: HubDouble, made: CompressedModel) -> None:
    hub.add("lab/base", {"README.md": b"---\nlicense: llama3.2\nlanguage: [en]\nlicense_name: x\n---\n# Base\n"})
    found = front_matter(card_of(made, base_model="lab/base"))
    assert found["base_model"] == "lab/base" and found["base_model_relation"] == "quantized"
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert found["license"] == "llama3.2" and found["license_name"] == "x" and found["language"] == ["en"]
    assert {"llmcompress", "compressed-tensors", "gptq", "4-bit"} <= set(found["tags"])  # type: ignore[call-overload]
    (index,) = found["model-index"]  # type: ignore[misc]
    (result,) = index["results"]
    (measured,) = made.report.quality
    assert result["metrics"][0]["value"] == pytest.approx(measured.compressed.perplexity, abs=1e-4)


def test_the_body_has_numbers_with_intervals_code_to_load_and_how_it_was_made(
    hub: HubDouble, made: CompressedModel
) -> None:
    card = card_of(made)
    (measured,) = made.report.quality
    assert f"| {measured.dense.perplexity:.2f} | {measured.compressed.perplexity:.2f} |" in card
    assert "change (95 % interval)" in card and f'from_pretrained("{NAME}", dtype="auto")' in card
    assert f"vllm serve {NAME}" in card and "scheme: int4_g16" in card
    assert "llmcompress compress" in card and "## Limits" in card


def test_no_place_on_this_computer_is_in_anything_that_leaves(
    hub: HubDouble, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "ada"
    base, text = home / "models" / "my-llama", home / "corpus" / "secret-text.txt"
    text.parent.mkdir(parents=True)
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    shutil.copytree(tiny, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
    settings = {"source": str(text), "samples": 4, "tokens": 32}
    out = compress(str(base), {**RECIPE, "calibration": settings}, home / "results" / "out")
    monkeypatch.setenv("HOME", str(home))
    out.push(NAME)
    everything = b"\n".join(hub.repos[NAME].files.values()) + hub.bodies
    assert str(home).encode() not in everything and str(tmp_path).encode() not in everything
    assert b"my-llama" in everything and b"secret-text.txt" in everything
    from llmcompress import verify

    assert not verify(NAME).failed, "recipe and report of the published model still belong together"


def test_formats_of_one_model_share_a_repository(hub: HubDouble, made: CompressedModel, tmp_path: Path) -> None:
    assert made.folder is not None
    made.export("plain", tmp_path / "dense")
    push([made.folder, tmp_path / "dense"], HubRepository(repository=NAME))
    files = hub.repos[NAME].files
    assert {"model.safetensors", "plain/model.safetensors", "plain/llmcompress_files.json", "README.md"} <= files.keys()
    listed = json.loads(files["plain/llmcompress_files.json"])["files"]
    assert (
        "model.safetensors" in listed
        and "plain/model.safetensors" not in json.loads(files["llmcompress_files.json"])["files"]
    )
    card = files["README.md"].decode()
    assert "| plain | plain/ |" in card and "read back, equal to the model's" in card


OWN = "---\nlicense: mit\ntags:\n- mine\nthumbnail: a.png\n---\n\n# My model\n\nHello.\n"
OURS = {"license": "apache-2.0", "base_model": "a/b", "tags": ["llmcompress", "4-bit"]}


def test_a_users_own_card_keeps_its_text_and_its_settings() -> None:
    once = merged_card(OWN, OURS, "# Ours")
    assert front_matter(once) == {
        "license": "mit", "base_model": "a/b", "tags": ["mine", "llmcompress", "4-bit"], "thumbnail": "a.png",
    }  # fmt: skip
    assert once.index("# My model") < once.index(BEGIN) < once.index("# Ours") < once.index(END)


def test_merging_again_replaces_our_part_alone() -> None:
    once = merged_card(OWN, OURS, "# Ours") + "\nWritten below.\n"
    again = merged_card(once, {**OURS, "base_model": "c/d", "tags": ["llmcompress", "8-bit"]}, "# Ours, newer")
    assert again.count(BEGIN) == 1 and "# Ours, newer" in again and "Written below." in again and "Hello." in again
    assert front_matter(again)["base_model"] == "c/d" and front_matter(again)["license"] == "mit"
    assert front_matter(again)["tags"] == ["mine", "llmcompress", "8-bit"]
    assert merged_card(again, {**OURS, "base_model": "c/d", "tags": ["8-bit"]}, "# Ours, newer") == again


def test_a_card_without_front_matter_gets_one_and_a_broken_one_is_told() -> None:
    assert merged_card("# Plain\n", OURS, "x").startswith("---\nlicense: apache-2.0\n")
    with pytest.raises(CompressError, match="front matter is not YAML"):
        merged_card("---\na: [\n---\n", OURS, "x")


def test_texts_of_a_model_are_no_markup(hub: HubDouble, made: CompressedModel, tmp_path: Path) -> None:
    from llmcompress.records.estimate import Interval
    from llmcompress.records.evaluation import Evaluation
    from llmcompress.records.tasks import GenerationComparison, GenerationPair
    from llmcompress.report.folder import write_report

    one = Interval(mean=1.0, standard_error=None, count=4)
    pairs = tuple(
        GenerationPair(prompt=f"p{number}", dense="<script>alert(1)</script>", compressed=f"{END} x", rouge_l=1.0)
        for number in range(4)
    )
    told = GenerationComparison(
        source="prompts",
        rouge_l=one,
        same=one,
        repetition_change=one,
        tokens_change=one,
        followed_change=None,
        pairs=pairs,
    )
    evaluation = Evaluation(
        model="m", baseline="d", runner="torch", versions={}, machine={"cpu": "c"}, measurements=(told,),
        command=f"llmcompress evaluate {tmp_path}/out --baseline x/y",
    )  # fmt: skip
    assert made.folder is not None
    card = preview(
        [made.folder], HubRepository(repository=NAME), report=write_report(evaluation, tmp_path / "report")
    ).card
    assert "<script>" not in card and card.count(END) == 1 and "p2" in card and "p3" not in card
    assert str(tmp_path) not in card and "llmcompress evaluate out --baseline x/y" in card
