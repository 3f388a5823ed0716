"""Looks for access tokens, private keys and places on this computer in files that are about to be published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcompress.publishing.outgoing import OutgoingFile

SECRETS: Mapping[str, re.Pattern[bytes]] = {
    "Hugging Face token": re.compile(rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "OpenAI or Anthropic key": re.compile(rb"(?<![A-Za-z0-9])sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}"),
    "AWS access key": re.compile(rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "GitHub token": re.compile(rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,})"),
    "GitLab token": re.compile(rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20}"),
    "Google key": re.compile(rb"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}"),
    "Slack token": re.compile(rb"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,}"),
    "Weights & Biases key": re.compile(rb"(?i:wandb)[^\r\n]{0,40}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])"),
    "private key": re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "password in an address": re.compile(rb"https?://[^\s/@:\"'<>]+:[^\s/@\"'<>]+@"),
}
"""Forms that nothing else has: a hit is worth stopping for."""

PLACES: Mapping[str, re.Pattern[bytes]] = {
    "path of a home folder": re.compile(rb"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)[\w.-]+[/\\]|(?<![\w./])/root/\w"),
}

_ANY_TEXT = ("tokenizer.json", "vocab.*", "merges.txt", "LICEN[CS]E*", "COPYING*", "NOTICE*", "*.model", "*.tiktoken")
"""Vocabularies and licences, where paths are words like others."""
_TENSORS = (".gguf", ".bin", ".data", ".onnx_data")
"""Files of tensors, and where there is text in them it stands first."""
_BEGINNING = 2**25
_LARGEST_HEADER = 10**8


@dataclass(frozen=True)
class Secret:
    """Where something was found; never what."""

    file: str
    kind: str
    offset: int
    line: int | None
    """None in a binary file."""

    def __str__(self) -> str:
        place = f"byte {self.offset}" if self.line is None else f"line {self.line}"
        return f"{self.file}, {place}: {self.kind}"


def secrets_in(file: OutgoingFile) -> Iterator[Secret]:
    """Everything of a known form in a file that leaves, and the paths of home folders.

    Of files of tensors the header is read, in which there is text; every other file is read whole.
    """
    content = _readable(file)
    forms = dict(SECRETS)
    if not any(Path(file.name).match(pattern) for pattern in _ANY_TEXT):
        forms |= PLACES
        home = str(Path.home())
        if len(home) > len("/root"):
            forms["path of your home folder"] = re.compile(re.escape(home.encode()) + rb"(?![\w.-])")
    text = b"\0" not in content[:4096]
    for kind, pattern in forms.items():
        found = pattern.search(content)
        if found is not None:
            line = content.count(b"\n", 0, found.start()) + 1 if text else None
            yield Secret(file.name, kind, found.start(), line)


def _readable(file: OutgoingFile) -> bytes:
    """The part of a file in which there may be text."""
    if isinstance(file.content, bytes):
        return file.content
    with file.content.open("rb") as stream:
        if file.content.suffix == ".safetensors":
            return stream.read(min(int.from_bytes(stream.read(8), "little"), _LARGEST_HEADER))
        return stream.read(_BEGINNING if file.content.suffix in _TENSORS else -1)
