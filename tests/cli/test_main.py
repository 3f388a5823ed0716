"""The command line: what is imported, what goes to stdout and stderr, exit codes. The pipeline is a fake here."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import llmcompress
from llmcompress.cli.main import COMMANDS, main
from llmcompress.errors import CompressError, ExitCode
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.measurements import Divergence, Estimate, PerplexityResult, StageSeconds, WeightBytes
from llmcompress.records.report import Report
from llmcompress.records.rows import SiteReport

ROOT = Path(__file__).parent.parent.parent


def result(perplexity: float, **options) -> PerplexityResult:
    return PerplexityResult(
        **options,
        text="builtin:evaluation",
        window=512,
        bos=True,
        tokens=7000,
        perplexity=perplexity,
        bits_per_byte=1.5,
    )


def divergence() -> Divergence:
    share = Estimate(mean=0.0312, standard_error=0.0019)
    return Divergence(
        text="builtin:evaluation", window=512, bos=True, tokens=7000, top=64, top_mass=0.875,
        kl=Estimate(mean=0.0123, standard_error=None),
        kl_median=0.01, kl_90=0.03, kl_99=0.2, loss_increase=Estimate(mean=0.04879, standard_error=0.002),
        same_top=Estimate(mean=0.9, standard_error=0.004), right_to_wrong=share, wrong_to_right=share,
    )  # fmt: skip


def report() -> Report:
    rows = [
        SiteReport(site=f"model.layers.{n}.mlp.up_proj", algorithm="gptq", scheme="int4_g32", bits_per_weight=4.5,
                   error=0.001 * n, error_before=0.01, tokens=100, degraded="damping raised to 0.1" if n == 7 else None)
        for n in range(8)
    ]  # fmt: skip
    return Report(
        model="m", recipe_hash="0123456789abcdef", versions={}, machine={}, calibration_tokens=100, sites=tuple(rows),
        refused={"model.layers.0.moe": "expert bank"}, warnings=("few samples",),
        measurements=(
            result(20, of="dense", from_cache=True), result(21, of="compressed"), divergence(),
            WeightBytes(of="dense", bytes=4_850_744), WeightBytes(of="compressed", bytes=1_500_000),
            StageSeconds(stage="compress", seconds=61.0),
        ),
    )  # fmt: skip


PLAN = {
    "model": "m",
    "family": "llama",
    "sites": [
        {"site": f"model.layers.{n}.{site}", "passes": ["awq", "gptq"], "scheme": scheme, "bits_per_weight": 4.5,
         "bytes": 1000}
        for n in range(2)
        for site, scheme in (("mlp.up_proj", "int4_g32"), ("mlp.gate", None))
    ],
    "refused": {"lm_head": "not inside a block"},
    "bytes_dense": 4_850_744,
    "output_bytes": 1_500_000,
    "peak_memory_bytes": 90_000_000,
    "estimated_seconds": 75.0,
    "license": "mit: the result may be published, with the model's notice",
    "publishes": ["me/small"],
    "warnings": ["few samples"],
}  # fmt: skip


class FakePipeline(types.ModuleType):
    """Remembers its calls; `failure` is raised by all of them."""

    def __init__(self):
        super().__init__("llmcompress.pipeline")
        self.calls = []
        self.failure = None

    def _called(self, *args, **options):
        self.calls.append((args, options))
        if self.failure:
            raise self.failure

    def compress(self, model, recipe, output, *, device, overwrite, fresh, offload, progress):
        self._called(model, recipe, output, device=device, overwrite=overwrite, fresh=fresh)
        assert offload == "auto"
        progress.stage("compress", 2)
        progress.note("a decision")
        progress.step("block 1/2")
        return types.SimpleNamespace(report=report(), published=())

    def plan(self, model, recipe, *, offload, machine, probe_on, progress):
        self._called(model, recipe, probed=probe_on is not None)
        return types.SimpleNamespace(model_dump=lambda mode: PLAN)

    def evaluations(self, model, tasks, *, baseline, runner, device, progress):
        self._called(model, tasks, runner=runner, device=device)
        yield Evaluation(model=model, runner=runner, versions={}, machine={}, measurements=(result(20.0),))


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "llmcompress.pipeline", fake)
    monkeypatch.setitem(sys.modules, "llmcompress.model_evaluation", fake)
    monkeypatch.setattr(llmcompress, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        written = capsys.readouterr()
        return exit_.value.code, written.out, written.err

    return call


# ---- help and imports


def test_help_of_every_command_imports_nothing_heavy():
    commands = [[], *([name] for name in COMMANDS), *(["recipes", name] for name in ("ls", "show", "copy"))]
    program = f"""
import sys
from llmcompress.cli.main import main
for command in {commands!r}:
    try:
        main([*command, "--help"])
    except SystemExit as exit:
        assert exit.code == 0, command
heavy = {{"torch", "transformers", "pydantic", "datasets", "numpy", "rich", "yaml"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"llmcompress {name}" in done.stdout for name in COMMANDS)


def test_import_llmcompress_is_light_and_names_its_public_things():
    program = """
import sys, llmcompress
assert not {"torch", "pydantic", "click"} & set(sys.modules)
assert set(llmcompress.__all__) <= set(dir(llmcompress))
from llmcompress import CompressError
try:
    llmcompress.compres
except AttributeError as error:
    assert "compres" in str(error)
else:
    raise SystemExit("found what is not there")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in (ROOT / "llmcompress").iterdir()}
    assert not modules & set(llmcompress.__all__), "importing that module would replace the function"


def test_python_dash_m_shows_the_version_of_the_project():
    done = subprocess.run(
        [sys.executable, "-m", "llmcompress", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f'version = "{done.stdout.split()[-1]}"' in (ROOT / "pyproject.toml").read_text()


# ---- usage


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["compres", "m"], "did you mean `compress`?"),
        (["recipes", "sho"], "No such command 'sho'"),
        (["compress", "m", "--presett", "w4"], "--preset"),
        (["compress", "m", "-o", "out"], "--preset NAME, --recipe FILE"),
        (["compress", "m", "-o", "out", "--preset", "w4", "--recipe", "r.yaml"], "--preset NAME, --recipe FILE"),
        (["compress", "m", "--preset", "w4"], "-o DIR"),
        (["evaluate", "m", "--window", "1"], "--window"),
        ([], "Usage: llmcompress"),
    ],
)
def test_a_wrong_command_line_says_what_to_write(run, arguments, hint):
    code, out, err = run(*arguments)
    assert code == ExitCode.USAGE
    assert hint in err and not out


def test_with_json_even_a_wrong_command_line_is_one_json_object(run):
    code, out, _ = run("compress", "m", "--json", "--overwite")
    assert code == json.loads(out)["error"]["exit_code"] == ExitCode.USAGE


# ---- compress


def test_compress_reads_the_preset_and_shows_quality_bytes_and_the_worst_sites(run, pipeline):
    code, out, err = run("compress", "m", "--preset", "tiny/gptq", "-o", "out", "--set", "seed=3", "--device", "cpu")
    assert code == 0
    (model, recipe, output), options = pipeline.calls[0]
    assert (model, recipe.model, recipe.seed, output) == ("m", "m", 3, Path("out"))
    assert options == {"device": "cpu", "overwrite": False, "fresh": False}
    assert re.search(r"builtin:evaluation +20\.000 +21\.000 +1\.050 ±0\.002", out)
    assert re.search(r"KL +0\.0123\n", out.replace(" \n", "\n")) and re.search(r"top-k mass +87\.5%", out)
    assert re.search(r"same top token +90\.00% ±0\.40%", out) and re.search(r"right → wrong +3\.12% ±0\.19%", out)
    assert "dense scores: from the cache" in out
    assert "4.9 MB → 1.5 MB (0.31 of it)" in out
    worst = re.findall(r"model\.layers\.(\d)\.mlp\.up_proj +gptq", out)
    assert worst == ["7", "6", "5", "4", "3"]
    assert "warning: gptq, 1 of 8 sites: damping raised to 0.1 (model.layers.7.mlp.up_proj)" in out
    assert "expert bank" in out and "warning: few samples" in out
    assert "note: a decision" in err and "saved to out" in err


def test_the_model_may_come_from_the_recipe(run, pipeline):
    assert run("compress", "--preset", "tiny/rtn", "-o", "out", "--overwrite", "--fresh")[0] == 0
    (model, _, _), options = pipeline.calls[0]
    assert model == "builtin:books-llama"
    assert options == {"device": "auto", "overwrite": True, "fresh": True}


def test_without_any_model_nothing_starts(run, pipeline):
    code, _, err = run("compress", "--preset", "w4", "-o", "out")
    assert code == ExitCode.USAGE and "[recipe.no-model]" in err and not pipeline.calls


def test_json_is_the_report_and_the_folder_on_stdout_alone(run, pipeline):
    code, out, err = run("compress", "m", "--preset", "tiny/rtn", "-o", "out", "--json")
    found = json.loads(out)
    assert code == 0
    assert found.pop("output") == "out"
    assert Report.model_validate(found) == report()
    assert "compress (2 steps)" in err


def test_dry_run_shows_the_plan_and_compresses_nothing(run, pipeline):
    code, out, _ = run("compress", "m", "--preset", "tiny/rtn", "--dry-run")
    assert code == 0 and len(pipeline.calls) == 1
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj +awq, gptq +int4_g32 +2 +4\.50 +2\.0 kB", out)
    assert re.search(r"model\.layers\.\*\.mlp\.gate +awq, gptq +dense", out)
    assert "4.9 MB → 1.5 MB" in out and "90.0 MB" in out and "1:15" in out and "few samples" in out
    assert "mit: the result may be published" in out and "publishes to me/small" in out
    assert json.loads(run("compress", "m", "--preset", "tiny/rtn", "--dry-run", "--json")[1]) == PLAN


def test_a_plan_probes_where_it_is_asked_to_and_a_run_never_does(run, pipeline):
    assert run("plan", "m", "--preset", "tiny/rtn", "--probe")[0] == 0
    assert pipeline.calls[-1][1] == {"probed": True}
    code, _, err = run("compress", "m", "--preset", "tiny/rtn", "-o", "out", "--probe")
    assert code == 2 and "--dry-run" in err


def test_a_recipe_file_is_read_and_its_mistakes_are_told_with_the_line(run, pipeline, tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\npasses:\n  - rtn: {shceme: int4_g32}\n")
    code, out, err = run("compress", "--recipe", "r.yaml", "-o", "out")
    assert code == ExitCode.USAGE and not out and not pipeline.calls
    assert "r.yaml line 3 (passes.0.rtn.shceme)" in err and "did you mean `scheme`?" in err
    code, out, _ = run("compress", "--recipe", "r.yaml", "-o", "out", "--json")
    assert json.loads(out)["error"]["code"] == "recipe.unknown-key"


def test_code_of_a_repository_runs_only_after_a_yes(run, pipeline, tmp_path):
    (tmp_path / "r.yaml").write_text(f"model: m\nrevision: '{'0' * 40}'\ntrust_remote_code: true\npasses: [rtn]\n")
    code, _, err = run("compress", "--recipe", "r.yaml", "-o", "out")
    assert code == ExitCode.USAGE and "add --yes" in err and not pipeline.calls
    assert run("compress", "--recipe", "r.yaml", "-o", "out", "--yes")[0] == 0


# ---- failures


@pytest.mark.parametrize(
    "exit_code", [ExitCode.USAGE, ExitCode.REFUSED, ExitCode.RESOURCES, ExitCode.HUB, ExitCode.GATE]
)
def test_every_known_failure_has_its_exit_code_and_says_what_where_fix_saved(run, pipeline, exit_code):
    pipeline.failure = CompressError(
        "output.exists", "out exists", where="out", fix="add --overwrite", saved="the old one", exit_code=exit_code
    )
    code, out, err = run("compress", "m", "--preset", "tiny/rtn", "-o", "out")
    assert code == exit_code and not out
    assert "error: out exists [output.exists]\n  where: out\n  fix: add --overwrite\n  saved: the old one" in err
    code, out, _ = run("compress", "m", "--preset", "tiny/rtn", "-o", "out", "--json")
    assert code == exit_code and json.loads(out) == {"error": pipeline.failure.as_dict()}


@pytest.mark.parametrize(
    ("failure", "code", "word"),
    [
        (MemoryError("no room"), ExitCode.RESOURCES, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), ExitCode.RESOURCES, "calibration.batch"),
        (OSError(28, "No space left on device"), ExitCode.RESOURCES, "out of disk space"),
        (ZeroDivisionError("oops hf_abcdefghijklmnop"), ExitCode.BUG, "ZeroDivisionError: oops hf_***"),
    ],
)
def test_any_other_failure_is_short_on_screen_and_complete_in_a_file(run, pipeline, tmp_path, failure, code, word):
    pipeline.failure = failure
    got, _, err = run("compress", "m", "--preset", "tiny/rtn", "-o", "out")
    assert got == code and word in err and "Traceback" not in err
    (log,) = tmp_path.glob("llmcompress-*.log")
    assert str(log) in err
    assert "Traceback" in log.read_text() and "hf_abcdefghijklmnop" not in log.read_text() + err


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_ends_with_130_and_says_how_to_go_on(run, pipeline, tmp_path, kept):
    if kept:
        (tmp_path / "out.run").mkdir()
        (tmp_path / "out.run" / "journal.jsonl").touch()
    pipeline.failure = KeyboardInterrupt()
    code, _, err = run("compress", "m", "--preset", "tiny/rtn", "-o", "out")
    assert code == ExitCode.INTERRUPTED
    assert ("run the same command again" in err) == kept
    assert run("evaluate", "m")[0] == ExitCode.INTERRUPTED


# ---- the other commands


def test_evaluate_passes_texts_and_window_on(run, pipeline, tmp_path):
    (tmp_path / "a.txt").touch()
    code, out, _ = run("evaluate", "m", "--perplexity", "wikitext2:test", "--perplexity", "a.txt", "--window", "64")
    (model, tasks), _ = pipeline.calls[0]
    assert code == 0 and model == "m"
    assert [(task.source, task.split, task.window) for task in tasks] == [
        ("wikitext2", "test", 64),
        ("a.txt", "test", 64),
    ]
    assert re.search(r"perplexity on builtin:evaluation +20\.00 +window 512, BOS, 7,000 tokens", out)
    assert json.loads(run("evaluate", "m", "--json")[1])["measurements"] == [result(20.0).model_dump()]


def test_inspect_shows_the_map(run, monkeypatch):
    found = {"family": "llama", "tied": True, "blocks": [{"kind": 0, "sites": [{"name": "q", "outputs": 3}]}],
             "refused": [{"name": "x", "reason": "fused"}]}  # fmt: skip
    monkeypatch.setattr("llmcompress.evaluation.inspection.inspect_folder", lambda folder: found)
    code, out, _ = run("inspect", "builtin:books-llama")
    assert code == 0 and "llama" in out and "fused" in out
    assert json.loads(run("inspect", "builtin:books-llama", "--json")[1])["family"] == "llama"


def test_rows_of_one_site_count_once_and_empty_columns_are_left_out(run, pipeline, monkeypatch):
    rows = [
        SiteReport(site=f"layers.{n}.up_proj", algorithm=algorithm, error=error, sparsity=0.5)
        for n in range(3)
        for algorithm, error in (("wanda", 0.5), ("sparsegpt", 0.1 * n))
    ]
    pruned = report().model_copy(update={"sites": tuple(rows)})
    monkeypatch.setattr(
        pipeline, "compress", lambda *arguments, **options: types.SimpleNamespace(report=pruned, published=())
    )
    out = run("compress", "m", "--preset", "tiny/wanda", "-o", "out")[1]
    assert "worst sites of 3" in out and "plain rounding" not in out and "scheme" not in out
    assert re.findall(r"layers\.(\d)\.up_proj +(\w+) +([\d.]+)%", out) == [
        ("2", "sparsegpt", "20.000"), ("1", "sparsegpt", "10.000"), ("0", "sparsegpt", "0.000")]  # fmt: skip


def test_schema_is_json_schema(run):
    code, out, _ = run("schema")
    assert code == 0 and "gptq" in json.loads(out)["properties"]["passes"]["items"]["anyOf"][0]["properties"]


def test_recipes_are_listed_shown_and_copied(run, tmp_path):
    assert re.search(r"tiny/awq-gptq +AWQ scales", run("recipes", "ls")[1])
    assert {"w4", "w8a8"} <= {row["name"] for row in json.loads(run("recipes", "ls", "--json")[1])}
    text = (ROOT / "configs/recipes/w4.yaml").read_text()
    assert run("recipes", "show", "w4")[1] == text
    assert json.loads(run("recipes", "show", "w4", "--json")[1])["seed"] == 0
    assert run("recipes", "copy", "w4") == (0, "w4.yaml\n", "")
    assert (tmp_path / "w4.yaml").read_text() == text
    code, _, err = run("recipes", "copy", "w4")
    assert code == ExitCode.USAGE and "--overwrite" in err
    assert run("recipes", "copy", "w8", "w4.yaml", "--overwrite")[0] == 0
    assert (tmp_path / "w4.yaml").read_text() != text
    code, _, err = run("recipes", "show", "w4-qwa")
    assert code == ExitCode.USAGE and "did you mean" in err
