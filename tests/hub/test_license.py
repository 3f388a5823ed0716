"""A plan says what the license of the dense model means for who publishes the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.publishing.license import License, license_of
from tests.hub.server import HubDouble


@pytest.mark.parametrize(
    ("card", "part"),
    [
        ("license: apache-2.0", "may be published"),
        ("license: cc-by-nc-4.0", "non-commercial"),
        ("license: cc-by-nd-4.0", "must not be published"),
        ("license: other\nlicense_name: own\nlicense_link: https://a.b/c", "own (https://a.b/c): terms of its own"),
        ("license: llama3.2", "llama3.2: terms of its own"),
        ("language: en", "no license was found"),
    ],
)
def test_what_a_card_says_becomes_what_the_publisher_may_do(tmp_path: Path, card: str, part: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# Model\n")
    assert part in license_of(tmp_path, hub_id=None).note


def test_a_model_of_the_hub_is_asked_for_there(hub: HubDouble, tmp_path: Path) -> None:
    hub.add("lab/base", {"README.md": b"---\nlicense: mit\n---\n"})
    assert license_of(tmp_path, hub_id="lab/base") == License("mit")


def test_a_hub_that_does_not_answer_leaves_the_license_unknown(
    hub: HubDouble, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert license_of(tmp_path, hub_id="lab/base") == License()
