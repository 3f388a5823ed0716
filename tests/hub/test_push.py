"""A push is one commit of a whole, verified folder; the same again is none; nothing else than the folder leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from llmcompress import verify
from llmcompress.compressed_model import CompressedModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.hub_upload import push
from llmcompress.publishing.destinations import HubRepository
from llmcompress.verification.published import published_folder
from llmcompress.verification.verifying import verified_whole
from tests.hub.server import HubDouble
from tests.warm_python import WarmPython

NAME = "me/tiny-w4"


def wanted(**settings: object) -> HubRepository:
    return HubRepository.model_validate({"repository": NAME, **settings})


def folder_of(made: CompressedModel) -> Path:
    assert made.folder is not None
    return made.folder


def test_a_push_is_one_commit_of_the_whole_folder_in_a_private_repository(
    hub: HubDouble, made: CompressedModel
) -> None:
    done = made.push(NAME)
    repo = hub.repos[NAME]
    assert repo.private and len(repo.commits) == 2 and done.commit == repo.branches["main"]
    assert done.url == f"{hub.url}/{NAME}"
    sent = {name for name in repo.files if name != ".gitattributes"}
    assert sent == {path.name for path in folder_of(made).iterdir()} | {"README.md"}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert repo.files[name] == (folder_of(made) / name).read_bytes()


def test_what_is_downloaded_again_has_the_digests_of_its_list(hub: HubDouble, made: CompressedModel) -> None:
    made.push(NAME)
    found = verify(NAME)
    assert not found.failed and {each.name for each in found.checks if each.result == "ok"} >= {
        "files",
        "tensors",
        "recipe",
    }
    assert Path(snapshot_download(NAME)).joinpath("model.safetensors").read_bytes()


def test_every_format_of_a_repository_is_verified(
    hub: HubDouble, made: CompressedModel, tmp_path: Path, our_python: WarmPython
) -> None:
    """Its files, and with `deep` each in a fresh process: not the root alone."""

    def fresh(program: str, arguments: Sequence[str]) -> str:
        done = our_python.run(program, *arguments, imports_us=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    made.export("plain", tmp_path / "dense")
    push([folder_of(made), tmp_path / "dense"], wanted())
    folder = published_folder(NAME)
    checks = verified_whole(folder, name=NAME, deep=True, fresh=fresh).checks
    assert {each.folder for each in checks if each.result != "skipped" and each.name == "files"} == {"", "plain"}
    assert [each.result for each in checks if each.name == "reload"] == ["ok", "ok"]
    assert not [each for each in checks if each.result == "failed"]
    repo = hub.repos[NAME]
    weights = bytearray(repo.files["plain/model.safetensors"])
    weights[-1] ^= 1
    del (files := dict(repo.files))["model.safetensors"]
    repo.commit({**files, "plain/model.safetensors": bytes(weights)}, "main")
    failed = {(each.folder, each.name): each.where for each in verify(NAME).failed}
    assert failed[("", "files")] == failed[("plain", "files")] == ("model.safetensors",)


def test_formats_without_a_model_at_the_root_are_verified_too(
    hub: HubDouble, made: CompressedModel, tmp_path: Path
) -> None:
    made.export("plain", tmp_path / "results" / "plain")
    found = verify(tmp_path / "results")
    assert {each.folder for each in found.checks} == {"plain"} and not found.failed


def test_the_same_again_says_so_and_makes_no_commit(hub: HubDouble, made: CompressedModel) -> None:
    first = made.push(NAME)
    again = made.push(NAME)
    assert again.commit == first.commit and not again.changed and not again.removed
    assert len(hub.repos[NAME].commits) == 2 and hub.called("POST", "/commit/") == 1


def test_a_branch_a_tag_and_a_message(hub: HubDouble, made: CompressedModel) -> None:
    hub.add(NAME, {"a.txt": b"a"}, private=True)
    done = push([folder_of(made)], wanted(revision="v2", tag="v2.0", message="Second"))
    repo = hub.repos[NAME]
    assert repo.branches["v2"] == repo.tags["v2.0"] == done.commit != repo.branches["main"]
    assert repo.messages[-1] == "Second" and repo.files == {"a.txt": b"a"}
    push([folder_of(made)], wanted(revision="v2", tag="v2.0"))
    repo.tags["v1.0"] = repo.branches["main"]
    with pytest.raises(CompressError, match=r"the tag v1\.0 .* names another commit"):
        push([folder_of(made)], wanted(revision="v2", tag="v1.0"))


def test_a_pull_request_leaves_the_branch_alone(hub: HubDouble, made: CompressedModel) -> None:
    hub.add("other/model", {"README.md": b"# Theirs\n"})
    done = push([folder_of(made)], HubRepository(repository="other/model", create_pr=True))
    repo = hub.repos["other/model"]
    assert done.pull_request == f"{hub.url}/other/model/discussions/1" and list(repo.files) == ["README.md"]
    card = repo.commits[repo.pull_requests[0]]["README.md"].decode()
    assert card.index("# Theirs") < card.index("## What compression costs")


def test_only_what_llmcompress_wrote_leaves(hub: HubDouble, made: CompressedModel, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(folder_of(made), tmp_path / "out"))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "journal.jsonl", ".env"):
        (folder / name).write_text("HF_TOKEN=hf_" + "b" * 34)
    push([folder], wanted())
    assert (
        not {"training_args.bin", "optimizer.pt", "rng_state.pth", "journal.jsonl", ".env"}
        & hub.repos[NAME].files.keys()
    )
    assert b"hf_bbbb" not in hub.bodies


def test_what_an_earlier_upload_left_is_removed_and_what_people_added_stays(
    hub: HubDouble, made: CompressedModel
) -> None:
    files = json.dumps({"files": {"old-notes.json": None, "model-00001-of-00002.safetensors": None}}).encode()
    hub.add(NAME, {
        "llmcompress_files.json": files,
        "old-notes.json": b"{}",
        "model-00001-of-00002.safetensors": b"x",
        "model.safetensors.index.json": b"{}",
        "picture.png": b"png",
    }, private=True)  # fmt: skip
    done = push([folder_of(made)], wanted())
    assert set(done.removed) == {"old-notes.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert hub.repos[NAME].files["picture.png"] == b"png"


def test_a_folder_that_is_not_as_written_stays_here(hub: HubDouble, made: CompressedModel, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(folder_of(made), tmp_path / "out"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CompressError, match="files: 1 changed of") as refused:
        push([folder], wanted())
    assert refused.value.exit_code is ExitCode.GATE and "model.safetensors" in refused.value.where
    assert NAME not in hub.repos


def test_a_folder_of_another_program_is_refused(hub: HubDouble, tiny: Path) -> None:
    with pytest.raises(CompressError, match="llmcompress did not write this folder") as refused:
        push([tiny], wanted())
    assert refused.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_another_visibility_is_told(hub: HubDouble, made: CompressedModel, private: bool) -> None:
    hub.add(NAME, {}, private=private)
    with pytest.raises(CompressError, match="was asked for") as refused:
        push([folder_of(made)], wanted(private=not private))
    assert refused.value.exit_code is ExitCode.USAGE
    push([folder_of(made)], wanted())
