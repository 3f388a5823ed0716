"""A model's name leads to its files, or to one line that says what to do; the network is never touched."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.source import BUILTIN, Source, find_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for the Hub: answers or raises what it is told, and remembers what it was asked."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files = ["config.json", "model.safetensors", "pytorch_model.bin"]
        self.on_info: Exception | None = None
        self.on_download: Exception | None = None
        self.asked: list[str | None] = []
        self.downloads: list[dict[str, Any]] = []

    def model_info(self, repo: str, *, revision: str | None = None, timeout: float) -> Any:
        self.asked.append(revision)
        if self.on_info:
            raise self.on_info
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.downloads.append({"repo": repo, **options})
        if self.on_download:
            raise self.on_download
        return str(self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / (options["revision"] or COMMIT))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda _, *args, **options: hub.model_info(*args, **options)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return hub


def answer(kind: type[Exception], status: int) -> Exception:
    """An error as the Hub's client raises it, whichever http library it uses."""
    problem = kind.__new__(kind)
    problem.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return problem


def refused(exit_code: ExitCode, code: str, *parts: str, model: str = "org/name", **options: Any) -> None:
    with pytest.raises(CompressError) as caught:
        find_source(model, **options)
    assert caught.value.exit_code is exit_code and caught.value.code == code, str(caught.value)
    assert caught.value.fix
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in:\n{caught.value}"


def test_a_folder_is_itself(tmp_path):
    assert find_source(str(tmp_path)) == Source(tmp_path, str(tmp_path))


def test_a_folder_goes_before_a_hub_id_of_the_same_name(hub, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_source("org/name").revision is None and not hub.asked


def test_the_bundled_model_is_found_and_unknown_ones_are_listed():
    source = find_source("builtin:books-llama")
    assert source.folder == BUILTIN / "books-llama" and source.is_builtin
    refused(ExitCode.USAGE, "model.unknown-builtin", "builtin:books-llama", model="builtin:nope")


@pytest.mark.parametrize("model", ["builtin:..", "builtin:../builtin/books-llama", "builtin:"])
def test_a_bundled_name_is_no_path(model):
    refused(ExitCode.USAGE, "model.unknown-builtin", model=model)


@pytest.mark.parametrize(("model", "options"), [("org/name", {"revision": "v1"}), ("org/name@v1", {})])
def test_a_hub_model_is_pinned_to_its_commit_and_comes_without_pickles(hub, model, options):
    source = find_source(model, **options)
    assert hub.asked == ["v1"]
    assert source.name == model and source.revision == COMMIT and not source.is_builtin
    wanted = hub.downloads[0]
    assert wanted["revision"] == COMMIT
    assert not any("bin" in pattern or "py" in pattern or ".pt" in pattern for pattern in wanted["allow_patterns"])


def test_damaged_files_of_a_hub_model_are_fetched_again_with_its_own_command(hub):
    assert f"hf download org/name --revision {COMMIT} --force-download" in find_source("org/name").how_to_get_again


@pytest.mark.parametrize("model", ["a/b/c", "my model", "org/na me", "-bad", "org/a..b"])
def test_c7_bad_ids_are_refused_at_once(hub, model):
    refused(ExitCode.USAGE, "model.bad-id", "ORG/NAME", model=model)
    assert not hub.asked and not hub.downloads


@pytest.mark.parametrize("model", ["./missing", "/no/such/folder", "~/no-such-folder-here"])
def test_missing_folders_are_refused_as_folders(hub, model):
    refused(ExitCode.USAGE, "model.no-folder", model, model=model)


def test_a_file_is_refused_as_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    refused(ExitCode.USAGE, "model.not-a-folder", model=str(tmp_path / "model.safetensors"))


def test_two_revisions_or_one_of_a_folder_are_refused(hub, tmp_path):
    refused(ExitCode.USAGE, "model.revision", "'v1'", "'v2'", model="org/name@v1", revision="v2")
    refused(ExitCode.USAGE, "model.revision", "'v2'", model=str(tmp_path), revision="v2")
    refused(ExitCode.USAGE, "model.revision", "'v2'", model="builtin:books-llama", revision="v2")


@pytest.mark.parametrize(
    ("kind", "status", "code", "part"),
    [
        (errors.RepositoryNotFoundError, 404, "hub.not-found", "hf auth login"),
        (errors.GatedRepoError, 403, "hub.gated", "request access at"),
        (errors.RevisionNotFoundError, 404, "hub.no-revision", "'v9'"),
        (errors.HfHubHTTPError, 401, "hub.login", "hf auth login"),
        (errors.HfHubHTTPError, 503, "hub.error", "503"),
    ],
)
@pytest.mark.parametrize("stage", ["on_info", "on_download"])
def test_c6_refusals_of_the_hub_end_in_exit_code_5(hub, kind, status, code, part, stage):
    setattr(hub, stage, answer(kind, status))
    refused(ExitCode.HUB, code, part, revision="v9")


def test_c6_who_is_logged_in_is_not_told_to_log_in(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.on_info = answer(errors.GatedRepoError, 403)
    with pytest.raises(CompressError) as caught:
        find_source("org/name")
    assert "hf auth login" not in str(caught.value) and "hf_secret" not in str(caught.value)


def test_without_network_the_cache_is_used(hub):
    hub.on_info = ConnectionError("no route")
    assert find_source("org/name").revision == COMMIT
    assert hub.downloads[0]["local_files_only"] is True


def test_errors_of_the_client_library_count_as_no_network(hub):
    base = errors.HfHubHTTPError.__bases__[0]
    hub.on_info = base.__new__(base)
    assert find_source("org/name").revision == COMMIT


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_source("org/name").revision == COMMIT
    assert not hub.asked and hub.downloads[0]["local_files_only"] is True


def test_offline_and_not_in_the_cache_is_said_so(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.on_download = errors.LocalEntryNotFoundError("nothing cached")
    refused(ExitCode.HUB, "hub.offline", "HF_HUB_OFFLINE", "builtin:books-llama")


def test_a_broken_download_and_a_full_disk_differ(hub):
    hub.on_download = ConnectionError("reset")
    refused(ExitCode.HUB, "hub.network", "run the command again")
    hub.on_download = OSError(errno.ENOSPC, "No space left on device")
    refused(ExitCode.RESOURCES, "hub.disk-full", "HF_HOME")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["config.json", "pytorch_model.bin"], "model.no-safetensors"),
        (["model.gguf"], "model.no-safetensors"),
        (["config.json", "onnx/model.safetensors"], "model.no-safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "model.adapter"),
    ],
)
def test_a12_a13_useless_repositories_are_refused_before_the_download(hub, files, code):
    hub.files = files
    refused(ExitCode.REFUSED, code, "org/name")
    assert not hub.downloads


def test_remote_code_needs_a_full_commit_and_brings_python_files(hub):
    for revision in (None, "main", COMMIT[:12]):
        refused(ExitCode.USAGE, "model.unpinned-code", "commit", revision=revision, trust_remote_code=True)
    find_source("org/name", revision=COMMIT, trust_remote_code=True)
    assert "*.py" in hub.downloads[0]["allow_patterns"]
