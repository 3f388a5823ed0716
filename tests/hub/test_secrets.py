"""A file with something secret in it stops the push; the error says where, and not what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmcompress.compressed_model import CompressedModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.hub_upload import push
from llmcompress.publishing.destinations import HubRepository
from llmcompress.publishing.outgoing import OutgoingFile
from llmcompress.publishing.secrets import secrets_in
from llmcompress.storage.disk import sha256
from llmcompress.storage.ownership import FileDigest, mark_output, written_files
from tests.hub.server import HubDouble

NAME = "me/tiny-w4"
KINDS = {
    "Hugging Face token": "hf_" + "Ab1" * 12,
    "OpenAI or Anthropic key": "sk-ant-" + "Ab1-" * 10,
    "AWS access key": "AKIA" + "ABCD2345" * 2,
    "GitHub token": "ghp_" + "a1" * 18,
    "GitLab token": "glpat-" + "a1" * 10,
    "Google key": "AIza" + "a1-_b" * 7,
    "Slack token": "xoxb-" + "1234567890",
    "Weights & Biases key": "WANDB_API_KEY=" + "0a" * 20,
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "password in an address": "https://ada:pw@example.org",
    "path of a home folder": "/home/ada/models",
}


@pytest.mark.parametrize(("kind", "text"), KINDS.items())
def test_every_known_form_is_found_with_its_line(kind: str, text: str) -> None:
    (found,) = secrets_in(OutgoingFile("config.json", f'{{\n "x": "{text}"\n}}\n'.encode()))
    assert (found.kind, found.line) == (kind, 2) and text not in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "hf_quant_config.json",
        "https://huggingface.co/a/b@main",
        "sha256:" + "0a" * 32,
        "/rooted/x",
        "a/home/b",
        "me@x.org",
    ],
)
def test_ordinary_text_is_none(text: str) -> None:
    assert not list(secrets_in(OutgoingFile("config.json", text.encode())))


def test_words_of_a_vocabulary_are_no_paths_but_tokens_are_tokens() -> None:
    words = b'{"/home/ada/": 1, "/root/x": 2}'
    assert not list(secrets_in(OutgoingFile("tokenizer.json", words)))
    assert list(secrets_in(OutgoingFile("tokenizer.json", words + KINDS["Hugging Face token"].encode())))


@pytest.fixture
def folder(made: CompressedModel, tmp_path: Path) -> Path:
    assert made.folder is not None
    return Path(shutil.copytree(made.folder, tmp_path / "out"))


def test_a_token_in_a_file_that_would_leave_stops_the_push(hub: HubDouble, folder: Path) -> None:
    token = KINDS["Hugging Face token"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "note": token}, indent=1))
    digests = written_files(folder)
    file = folder / "tokenizer_config.json"
    mark_output(folder, {**digests, file.name: FileDigest(file.stat().st_size, sha256(file))})
    with pytest.raises(CompressError, match="look like secrets") as refused:
        push([folder], HubRepository(repository=NAME))
    assert refused.value.exit_code is ExitCode.REFUSED
    assert "tokenizer_config.json, line" in refused.value.where and token not in str(refused.value)
    assert token.encode() not in hub.bodies and hub.called("POST", "/commit/") == 0


def test_a_token_in_the_header_of_a_weight_file_is_found(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "by": KINDS["Hugging Face token"]})
    (found,) = secrets_in(OutgoingFile("model.safetensors", weights))
    assert found.kind == "Hugging Face token"


def test_a_list_that_names_files_elsewhere_is_refused(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("x")
    (folder / "link.json").symlink_to(tmp_path / "private.txt")
    for name in ("../private.txt", "link.json", str(tmp_path / "private.txt")):
        mark_output(folder, {**written_files(folder), name: None})
        with pytest.raises(CompressError, match="names something outside the folder"):
            push([folder], HubRepository(repository=NAME))
        digests = written_files(folder)
        del digests[name]
        mark_output(folder, digests)
