"""Rows of the matrix at the command line: inject, give the command; exit code, message, fix, and what is left."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.main import main
from tests.faults import injected
from tests.faults.injected import CHEAPEST, Inject, config, file, recipe, text
from tests.faults.test_matrix import MATRIX
from tests.hub.conftest import hub, waits  # noqa: F401 (fixtures)
from tests.hub.server import TOKEN, HubDouble

DENSE = "compress dense --recipe cheapest.yaml -o out"
SHARDS = "compress shards --recipe cheapest.yaml -o out"
RECIPE = "compress dense --recipe recipe.yaml -o out"
TEXT = "compress dense --recipe calibrated.yaml -o out"
TIGHT_GATE = "{perplexity: [{source: builtin:evaluation, window: 32, max_windows: 2}], gate: {kl_mean: 1e-7}}"
NAME = "me/tiny-w4"


@dataclass(frozen=True)
class Case:
    """A row of the matrix and one way to inject it."""

    row: str
    inject: Inject
    command: str
    exit_code: int
    told: tuple[str, ...]
    """Parts of what is wrong and where: the file, the field, the value. Of a success, of its warnings."""
    fix: str = ""
    """Part of the advice."""
    left: tuple[str, ...] = ()
    """New files at the top of the folder; whatever was there is as it was."""


def damaged(what: str, content: Any) -> Case:
    told = ("model.safetensors", what)
    return Case("A1", file("dense/model.safetensors", content), DENSE, 3, told, "--force-download")


def nothing(place: Path) -> None:
    """The command itself is the fault."""


OUT = ("out",)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MESSAGES = '{"messages": [{"role": "user", "content": "hi"}]}\n'
BROKEN = '{\n "model_type": "llama",\n "hidden_size" 3\n}'
SPARSE_LATE = "passes: [{rtn: {scheme: int4_g16}}, {sparsegpt: {}}]\nevaluate: {}\n"
WIDE = CHEAPEST.replace("int4_g16", "int4_g24")
SHORT = '{"text": "the quick brown fox jumps over the lazy dog and the small model learns to read"}\n' * 3
CASES = (
    damaged("it has 76,168", lambda content: content[: len(content) // 2]),
    Case("A2", file("dense/model.safetensors", b""), DENSE, 3, ("model.safetensors: 0 bytes",), "--force-download"),
    Case(
        "A3", file("dense/model.safetensors", bytes(range(1, 200))), DENSE, 3, ("not those of a safetensors file",), "d"
    ),
    Case("A4", injected.two_shards_missing, SHARDS, 3, ("model-00002-of-00003", "model-00003-of-00003"), "hf download"),
    Case("A5", injected.tensor_missing, DENSE, 3, ("missing", injected.Q), "download the whole checkpoint"),
    Case(
        "A6", config(intermediate_size=40), DENSE, 3, ("[32, 64]", "[32, 40]", "intermediate_size = 40"), "config.json"
    ),
    Case("A7", injected.not_a_number, DENSE, 3, (injected.Q, "model.safetensors", "2 of 1024"), "download it again"),
    Case("A8", file("dense/config.json", BROKEN), DENSE, 3, ("config.json", "line 3, column 16"), "correct the file"),
    Case("A9", config(model_type="lllama9"), DENSE, 3, ("'lllama9'", "config.json"), "pip install -U transformers"),
    Case("A9", config(model_type=None), DENSE, 3, ("no model_type", "config.json"), "model_type"),
    Case("A10", config(architectures=["BertForMaskedLM"]), DENSE, 3, ("BertForMaskedLM",), "ForCausalLM"),
    Case("A10", injected.diffusion_pipeline, DENSE, 3, ("diffusion", "model_index.json"), "ForCausalLM"),
    Case(
        "A11", config(quantization_config={"quant_method": "gptq", "bits": 4}), DENSE, 3, ("gptq, 4 bits",), "original"
    ),
    Case("A12", injected.adapter_only, DENSE, 3, ("adapter_config.json",), "merge_and_unload"),
    Case("A13", injected.pickle_only, DENSE, 3, ("pickle", "pytorch_model.bin"), "safetensors"),
    Case("A14", injected.beyond_float16, RECIPE, 3, ("float16", "layers.1.self_attn.v_proj"), "bfloat16", ("out.run",)),
    Case("A15", injected.one_norm_in_float32, DENSE, 0, ("mixes dtypes (float32: 1 tensors",), left=OUT),
    Case("A16", config(tie_word_embeddings=True), DENSE, 3, ("lm_head.weight",), "tie_word_embeddings"),
    Case("A17", recipe(WIDE), RECIPE, 2, ("14 sites", "32 inputs, int4_g24"), "on_indivisible"),
    Case("A20", injected.far_token, TEXT, 3, ("'<far>' = 300", "288 rows"), "resize_token_embeddings(301)"),
    Case(
        "A21",
        config("dense/tokenizer_config.json", eos_token=None, pad_token=None),
        TEXT,
        0,
        ("padding token",),
        left=OUT,
    ),
    Case("A22", text(MESSAGES), TEXT, 3, ("text.jsonl", "chat template"), "chat_template"),
    Case("A23", config("dense/generation_config.json", temperature=0.6), DENSE, 0, ("temperature=0.6",), left=OUT),
    Case("A24", injected.second_checkpoint, DENSE, 3, ("model.safetensors.index.json",), "delete the one"),
    Case(
        "B1", injected.index_leaves_the_folder, SHARDS, 3, ("'../outside.safetensors'", "weight_map"), "copy the real"
    ),
    Case("B1", injected.link_leaves_the_folder, DENSE, 3, ("model.safetensors",), "no links"),
    Case("B2", injected.other_code, DENSE, 3, ("evil.py sha256", "not run"), "trust_remote_code"),
    Case("B3", injected.pickle_only, DENSE, 3, ("pytorch_model.bin",), "safetensors"),
    Case("B4", config(_attn_implementation_internal="a/b"), DENSE, 0, ("_attn_implementation_internal",), left=OUT),
    Case(
        "B5", recipe("passes: [rtn: !!python/object/apply:os.system [touch canary]]\n"), RECIPE, 2, ("line 1",), "plain"
    ),
    Case("B6", recipe(LAUGHS), RECIPE, 2, ("recipe.yaml line", "too many"), "write the values out"),
    Case("B7", recipe(f"{CHEAPEST}output: ../../etc\n"), RECIPE, 2, ("'output'", "line 3"), "use one of"),
    Case(
        "B12",
        injected.onnx_data_outside,
        "evaluate dense --runner onnxruntime --perplexity builtin:evaluation",
        3,
        ("../secret.bin", "model.onnx"),
        "export it again",
    ),
    Case("C1", recipe(CHEAPEST.replace("scheme", "shceme")), RECIPE, 2, ("'shceme'", "line 1"), "`scheme`"),
    Case("C2", recipe(f"{CHEAPEST}evaluate: {{}}\n"), RECIPE, 2, ("lines 2 and 3",), "keep one"),
    Case("C3", recipe(f"revision: 1234567\n{CHEAPEST}"), RECIPE, 2, ("1234567", "line 1"), 'revision: "1234567"'),
    Case("C4", recipe(f"{CHEAPEST}export: [gguf]\n"), RECIPE, 2, ("gguf cannot represent", "groups of 16"), "int4_g32"),
    Case("C5", recipe(SPARSE_LATE), RECIPE, 2, ("sparsegpt",), "before"),
    Case("C7", nothing, "compress a/b/c --recipe cheapest.yaml -o out", 2, ("'a/b/c'",), "ORG/NAME"),
    Case("C8", injected.filled_output, DENSE, 2, ("not empty", "out"), "--overwrite"),
    Case("C10", nothing, f"{DENSE} --device cuda:7", 3, ("'cuda:7'",), "cpu"),
    Case("D1", text(""), TEXT, 3, ("text.jsonl", "empty"), "another source"),
    Case("D2", text('{"text": "a b"}\n' * 40), TEXT, 3, ("2-3 tokens: 40 samples", "min_tokens"), "min_tokens"),
    Case("D3", text(SHORT), f"{TEXT} --set calibration.samples=64", 0, ("64",), left=OUT),
    Case(
        "D4", text('{"text": "the fox"}\n{"text": 3\n'), TEXT, 3, ("line 2", "column 11", "text.jsonl"), "skip_bad_rows"
    ),
    Case(
        "D4", text('{"text": "caf\xe9"}\n'.encode("latin-1") * 40), TEXT, 3, ("line 1", "byte 14"), "correct that row"
    ),
    Case("D5", text('{"body": "the quick brown fox"}\n' * 40), TEXT, 3, ("columns found: body",), "`column`"),
    Case("D6", nothing, f"{TEXT} --set calibration.tokens=500 --set calibration.samples=1", 0, ("64",), left=OUT),
    Case("D9", nothing, f"{TEXT} --set calibration.source=org/none", 5, ("org/none",), "builtin:calibration"),
    Case("E8", nothing, f"{DENSE} --set {shlex.quote(f'evaluate={TIGHT_GATE}')}", 6, ("kl_mean",), left=OUT),
    Case("F4", injected.output_is_a_file, DENSE, 2, ("is a file",), "does not exist yet"),
    Case(
        "G7", injected.search_file, "search dense --space search.yaml --fit 1kB -o study", 6, ("1 kB",), left=("study",)
    ),
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("everything")
    injected.write_everything(place)
    return place


@pytest.fixture
def place(everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and the caches elsewhere."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(shutil.copytree(everything, tmp_path / "place"))
    return tmp_path / "place"


def digests(place: Path) -> dict[str, str]:
    """Of all files."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ended(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout, and everything that was on the screen."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command), "--json"])
    shown = capsys.readouterr()
    return int(end.value.code or 0), json.loads(shown.out), shown.out + shown.err


@pytest.mark.parametrize("case", CASES, ids=[f"{case.row}-{number}" for number, case in enumerate(CASES)])
def test_the_command_ends_as_the_matrix_says(case: Case, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.inject(place)
    before = digests(place)
    code, printed, shown = ended(case.command, capsys)
    assert code == case.exit_code, shown
    assert TOKEN not in shown and "Traceback" not in shown
    error = printed.get("error")
    where = f"{error['what']} {error['where']}" if error else json.dumps(printed, ensure_ascii=False)
    assert all(part in where for part in case.told), where
    if error:
        assert error["exit_code"] == code and case.fix in error["fix"], error
    left = digests(place)
    assert {name: left.get(name) for name in before} == before, "what was there is as it was"
    assert {name.split("/")[0] for name in left.keys() - before.keys()} == set(case.left)
    assert not (place / "canary").exists()


def test_cases_are_rows_of_the_matrix() -> None:
    file_of_cases = Path(__file__).relative_to(Path(__file__).parents[1])
    named = f"{file_of_cases}::test_the_command_ends_as_the_matrix_says"
    assert {row for row, each in MATRIX.items() if named in each["tests"]} == {case.row for case in CASES}


@dataclass(frozen=True)
class Push:
    """What a Hub does to `push`."""

    row: str
    fault: dict[str, Any]
    words: str
    exit_code: int
    told: tuple[str, ...]
    fix: str


PUSHES = (
    Push("H1", {"method": "GET", "path": "whoami", "status": 401}, "", 5, ("401",), "hf auth login"),
    Push(
        "H3",
        {"method": "PUT", "path": "/lfs/", "status": 403, "message": "quota exceeded"},
        "",
        5,
        ("quota exceeded",),
        "token",
    ),
    Push(
        "H4",
        {"method": "POST", "path": "/commit/", "status": 429, "times": 99, "Retry_After": "3"},
        "",
        5,
        ("429",),
        "again",
    ),
    Push("H5", {"method": "PUT", "path": "/lfs/"}, "", 5, (NAME,), "push again"),
    Push("H8", {}, "--public", 2, ("is private, and public was asked for",), "settings"),
)


@pytest.mark.parametrize("push", PUSHES, ids=[push.row for push in PUSHES])
def test_push_ends_as_the_matrix_says_and_the_same_command_goes_on(
    push: Push,
    place: Path,
    hub: HubDouble,  # noqa: F811
    waits: list[float],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(DENSE, capsys)[0] == 0
    before = digests(place)
    if "status" in push.fault:
        hub.fail(push.fault["method"], push.fault["path"], **_rest(push.fault))
    elif push.fault:
        hub.drop(push.fault["method"], push.fault["path"], times=99)
    else:
        hub.add(NAME, {}, private=True)
    code, printed, shown = ended(f"push out {NAME} {push.words}", capsys)
    assert code == push.exit_code and TOKEN not in shown, shown
    error = printed["error"]
    assert all(part in f"{error['what']} {error['where']}" for part in push.told) and push.fix in error["fix"], error
    assert not hub.repos.get(NAME) or "config.json" not in hub.repos[NAME].files, "nothing was published"
    assert digests(place) == before
    hub.faults.clear()
    assert ended(f"push out {NAME}", capsys)[0] == 0 and "config.json" in hub.repos[NAME].files


def _rest(fault: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fault.items() if key not in ("method", "path")}
