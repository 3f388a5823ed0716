"""What users and engineers read uses the field's words: phrases that made readers stumble do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

INSTEAD = {
    # riddles → say what happened, or what it does
    r"(has|have) (no )?words|words for": "can (not) represent",
    r"(codes|code) (lie|lies|at (its|their) own width)|own width": "without padding, bits per code",
    r"norms? stands? on": "post-norm",
    r"looks? at more than": "needs more than",
    r"flattered": "too optimistic",
    r"to do it all the same|it all the same\b": "anyway",
    r"is no folder|no public model": "is neither a local folder nor a public model",
    r"to blame|by lot\b|of its own accord": "say the reason; at random; by default",
    r"knows? nothing (of|about)|nobody|somebody|whoever|[Ee]verybody": "name the code, the file or the process",
    r"ma(ke|kes|de|king) up for": "compensate",
    # terms of the field
    r"weights? (has|have|is at|are at) (a )?homes?|\bhomes\b": "weight offloading, weight store",
    r"shared out|shares out|sharing out": "mixed precision, allocation",
    r"\bforesight\b|foretell|foretold": "resource estimate, predict",
    r"single weights": "unstructured, individual weights",
    r"\bper input\b(?! (group|channel|site))(?!, one| instead)": "dynamic inference",
    r"longer gradients": "gradient clipping",
    r"\blistening\b|listeners?\b(?! in observers)": "input hooks, observers",
    r"share of (the |all )?(weights|parameters|channels|heads|units|zeros|blocks)": "fraction of the …, sparsity",
    r"multiplied out": "dequantized, converted to ordinary weights",
    r"\bspeechless\b|has_words|trial_network|keeps_inputs|\bspoils\b|before_linear": "a name of the field",
}
"""What may not be written → what to write."""

TEXTS = ("llmcompress/**/*.py", "configs/**/*.yaml", "docs/**/*.md", "*.md", "evals/*.md", "evals/tables/*.py")
HISTORY = {"docs/log.md", "docs/results.md"}
"""The log says what was thought then; the tables are written by a program."""


def lines() -> Iterator[tuple[str, str]]:
    """Place and text of every line."""
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in HISTORY and "/builtin/" not in name:
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    yield f"{name}:{number}", line


@pytest.mark.parametrize("phrase", INSTEAD)
def test_the_fields_words_are_used(phrase: str) -> None:
    found = [f"{place}: {line.strip()}" for place, line in lines() if re.search(phrase, line)]
    assert not found, f"write instead: {INSTEAD[phrase]}"


@pytest.mark.parametrize(
    "line",
    [
        "OpenVINO has no words for this model",
        "share of the weights to remove",
        "Bits shared out",
        "Per input: per input",
    ],
)
def test_a_phrase_that_made_readers_stumble_is_noticed(line: str) -> None:
    assert any(re.search(phrase, line) for phrase in INSTEAD)
