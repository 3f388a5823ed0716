"""`publish:` in a recipe: rights before any work, the push after it, and when that fails only the push is repeated."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from llmcompress import compress
from llmcompress.cli.main import main
from llmcompress.errors import CompressError, ExitCode
from llmcompress.recipe import parse_recipe
from tests.hub.conftest import RECIPE
from tests.hub.server import TOKEN, HubDouble
from tests.tiny_folder import write_tiny_llama

NAME = "me/tiny-w4"
PUBLISHED = {**RECIPE, "evaluate": {}, "publish": {"hub": [NAME]}}


def run(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(PUBLISHED))
    return file


def test_a_recipe_pushes_what_it_makes(hub: HubDouble, tiny: Path, tmp_path: Path) -> None:
    made = compress(str(tiny), PUBLISHED, tmp_path / "out")
    (pushed,) = made.published
    assert pushed.commit == hub.repos[NAME].branches["main"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hub.repos[NAME].files["model.safetensors"] == weights
    text = hub.repos[NAME].files["llmcompress_recipe.yaml"].decode()
    assert parse_recipe(text, "published").publish == (), "who runs it again does not publish under this name"
    assert made.recipe.publish and made.recipe.hash() == parse_recipe(made.recipe.to_yaml(), "r").hash()


def test_one_command_compresses_heals_exports_and_publishes(hub: HubDouble, tmp_path: Path) -> None:
    """The command of docs/publishing.md, with a text that is here and a training of two steps."""
    quick = [
        *("--set", "calibration={source: builtin:calibration, samples: 8, tokens: 32}"),
        *("--set", "passes.qat.training={steps: 2, batch: 4, learning_rate: 0.0001}"),
        *("--set", "evaluate={perplexity: [{source: builtin:evaluation, window: 32, max_windows: 2}]}"),
    ]
    out = tmp_path / "small"
    tiny = write_tiny_llama(tmp_path / "dense", intermediate_size=64)
    assert run("compress", tiny, "--preset", "w4-heal", *quick, "--export", "gguf", "--publish", NAME, "-o", out) == 0
    files = hub.repos[NAME].files
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    (gguf,) = (name for name in files if name.endswith(".gguf"))
    assert files[gguf] == (tmp_path / "small-gguf" / gguf).read_bytes()
    card = files["README.md"].decode()
    assert "qat" in card and "llama-cli -hf" in card and "| gguf | / |" in card and hub.repos[NAME].private
    config = json.loads(files["config.json"])
    assert config["quantization_config"]["quant_method"] == "compressed-tensors" and "needs llmcompress" not in card


def test_formats_go_where_the_recipe_says(hub: HubDouble, tiny: Path, tmp_path: Path) -> None:
    publish = [{"repository": NAME, "artifacts": ["model"]}, {"repository": "me/tiny-plain", "artifacts": ["plain"]}]
    compress(str(tiny), {**PUBLISHED, "export": ["plain"], "publish": {"hub": publish}}, tmp_path / "out")
    assert not [name for name in hub.repos[NAME].files if name.startswith("plain/")]
    assert b"quantization_config" not in hub.repos["me/tiny-plain"].files["config.json"]
    assert "export_report.json" in hub.repos["me/tiny-plain"].files


def test_rights_are_checked_before_the_model_is_read(hub: HubDouble, tiny: Path, tmp_path: Path) -> None:
    hub.users[TOKEN]["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(CompressError, match="can only read") as refused:
        compress(str(tmp_path / "no-such-model"), PUBLISHED, tmp_path / "out")
    assert refused.value.exit_code is ExitCode.HUB and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"artifacts": ["gguf"]}, "does not make"),
        ({"create_pr": True, "revision": "dev"}, "pull request cannot be opened"),
        ({"repository": "no-owner"}, "repository"),
    ],
)
def test_settings_that_cannot_be_are_told_before_any_work(
    hub: HubDouble, tiny: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(CompressError, match=said) as refused:
        compress(str(tiny), {**PUBLISHED, "publish": {"hub": [{"repository": NAME, **change}]}}, tmp_path / "out")
    assert refused.value.exit_code is ExitCode.USAGE and not hub.requests


def test_without_an_output_nothing_can_be_published(hub: HubDouble, tiny: Path) -> None:
    with pytest.raises(CompressError, match="there is no output folder"):
        compress(str(tiny), PUBLISHED)


def test_when_only_the_push_fails_the_line_that_repeats_it_works(
    hub: HubDouble, tiny: Path, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", 403, message="storage quota exceeded")
    out = tmp_path / "the out"
    assert run("compress", tiny, "--recipe", recipe, "-o", out, "--json") == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert "storage quota exceeded" in error["what"] and str(out) in error["saved"]
    assert (out / "model.safetensors").is_file() and not Path(f"{out}.run").exists()
    again = shlex.split(error["fix"].partition("then run: ")[2])
    assert again == ["llmcompress", "push", str(out), NAME] and run(*again[1:], "--json") == 0
    assert json.loads(capsys.readouterr().out)["commit"] == hub.repos[NAME].branches["main"]


def test_a_result_beyond_its_gate_is_not_pushed(hub: HubDouble, tiny: Path, tmp_path: Path) -> None:
    evaluate = {**RECIPE["evaluate"], "gate": {"kl_mean": 0.0}}  # type: ignore[dict-item]
    made = compress(str(tiny), {**PUBLISHED, "evaluate": evaluate}, tmp_path / "out")
    assert made.published == () and hub.called("POST", "") == 0
    with pytest.raises(CompressError, match="the quality gate is not kept") as refused:
        made.push(NAME)
    assert refused.value.exit_code is ExitCode.GATE and "not published" in refused.value.saved


def test_the_command_shows_what_it_would_send_and_sends_it(
    hub: HubDouble, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(str(tiny), {**PUBLISHED, "publish": {}}, tmp_path / "out")
    (tmp_path / "out" / "optimizer.pt").write_text("x")
    words = ("push", tmp_path / "out", NAME, "--base-model", "lab/base")
    assert run(*words, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["left_out"] == ["optimizer.pt"] and "model.safetensors" in shown["files"] and NAME not in hub.repos
    assert run(*words, "--public", "--tag", "v1") == 0
    assert "published" in capsys.readouterr().err and not hub.repos[NAME].private
    assert hub.repos[NAME].files["README.md"].decode() == shown["card"]
    assert hub.repos[NAME].tags["v1"] == hub.repos[NAME].branches["main"]
    assert run(*words) == 0 and "already up to date" in capsys.readouterr().err
    assert TOKEN not in json.dumps(shown)


ROUND_TRIP = """
import sys, torch
from llmcompress import compress, load, verify
out, recipe = sys.argv[1:]
made = compress("lab/base", recipe, out)
pushed = made.push("me/small")
model, tokenizer = load("me/small")
ids = torch.arange(20)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, load(out).model(ids).logits)
assert not verify("me/small").failed
print(made.report.base["commit"], pushed.commit)
"""


def test_compressed_by_id_pushed_and_loaded_by_id_is_the_same_byte_for_byte(
    tiny: Path, tmp_path: Path, recipe: Path
) -> None:
    """In a process of its own, with the environment variables that users set."""
    import os
    import subprocess
    import sys

    recipe.write_text(json.dumps({**PUBLISHED, "publish": {}}))
    with HubDouble().running() as hub:
        base = hub.add("lab/base", {path.name: path.read_bytes() for path in tiny.iterdir()} | {
            "README.md": b"---\nlicense: gemma\n---\n"
        })  # fmt: skip
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", ROUND_TRIP, str(tmp_path / "out"), str(recipe)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [base.branches["main"], hub.repos["me/small"].branches["main"]]
    files = hub.repos["me/small"].files
    cached = tmp_path / "home" / "hub" / "models--me--small" / "snapshots" / hub.repos["me/small"].branches["main"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert files[name] == (tmp_path / "out" / name).read_bytes() == (cached / name).read_bytes()
    assert b"license: gemma" in files["README.md"] and b"base_model: lab/base" in files["README.md"]


def test_a_plan_checks_the_rights_and_writes_nothing(
    hub: HubDouble, tiny: Path, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", tiny, "--recipe", recipe, "--json") == 0
    assert json.loads(capsys.readouterr().out)["output_bytes"] > 0
    hub.users[TOKEN]["auth"]["accessToken"]["role"] = "read"
    assert run("plan", tiny, "--recipe", recipe, "--json") == 5
    assert "can only read" in json.loads(capsys.readouterr().out)["error"]["what"]
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name] and NAME not in hub.repos
