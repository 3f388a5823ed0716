"""A decoder that OpenVINO's converter cannot follow becomes one that it can, and decodes the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmcompress.exporters.openvino_tokenizer import FILE, simplified, simplify_decoder
from tests.tiny_folder import tiny_tokenizer

STEPS = [
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
]


def with_steps(*more_tokens: str) -> dict[str, Any]:
    tokenizer = json.loads(tiny_tokenizer().to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(more_tokens)}
    return {**tokenizer, "decoder": {"type": "Sequence", "decoders": STEPS}}


def test_steps_that_do_nothing_are_left_out_and_every_text_stays_the_same(tmp_path: Path) -> None:
    given = with_steps()
    (tmp_path / FILE).write_text(json.dumps(given))
    simplify_decoder(tmp_path)
    made = json.loads((tmp_path / FILE).read_text())
    assert made == {**given, "decoder": STEPS[-1]}
    before, after = (Tokenizer.from_str(json.dumps(each)) for each in (given, made))
    ids = list(range(before.get_vocab_size()))
    assert before.decode(ids) == after.decode(ids) and before.decode([9, 44, 7]) == after.decode([9, 44, 7])


def test_steps_that_do_something_stay() -> None:
    for given in (with_steps("<0x0A>"), with_steps("a▁")):
        assert simplified(given) == given
    assert simplified({"model": {}, "decoder": None}) == {"model": {}, "decoder": None}
