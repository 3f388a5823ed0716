"""Mutates the JSON files of a tiny model, and says which mutations end in anything but a result or a CompressError.

python evals/fuzz_inputs.py --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.loader import loader_of
from llmcompress.loading.config import read_config
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import Source
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import probe
from llmcompress.planning import KnownModel, make_plan
from llmcompress.recipe import Recipe, parse_recipe

FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 3.5, -0.5, 1e300, float("nan"), float("inf"), 10_000_000, 2**31, 2**63, 10**30),
    *("", "text", "0", "../x", "a" * 300, "\x00", "Ünïcödé", "float16", [], [1], ["a", None], {}, {"a": 1}),
    *({"rope_type": "yarn"}, {"factor": 0}, [[]], [{}]),
)


class Mutation(NamedTuple):
    """One damaged file."""

    file: str
    what: str
    content: bytes


def mutations(folder: Path, *, count: int, seed: int) -> Iterator[Mutation]:
    """So many mutations of the JSON files in the folder, the same for the same seed."""
    choose = random.Random(seed)
    for _ in range(count):
        file = choose.choice((*FILES, FILES[0]))  # config.json twice as often
        yield _mutated(file, (folder / file).read_bytes(), choose)


def _mutated(file: str, content: bytes, choose: random.Random) -> Mutation:
    if choose.random() < 0.15:
        return _torn(file, content, choose)
    data = json.loads(content)
    holder = data
    path = []
    while isinstance(holder, dict) and holder:
        key = choose.choice(sorted(holder))
        path.append(key)
        if not isinstance(holder[key], dict) or choose.random() < 0.4:
            break
        holder = holder[key]
    if not path:
        return _torn(file, content, choose)
    changes: dict[str, Callable[[], None]] = {
        "removed": lambda: holder.pop(path[-1]),
        "replaced": lambda: holder.update({path[-1]: copy.deepcopy(choose.choice(_VALUES))}),
        "scaled": lambda: holder.update({path[-1]: _scaled(holder[path[-1]], choose)}),
    }
    name = choose.choices(tuple(changes), weights=(1, 6, 3))[0]
    changes[name]()
    return Mutation(file, f"{'.'.join(path)} {name}: {holder.get(path[-1])!r:.60}", json.dumps(data).encode())


def _scaled(value: Any, choose: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [value] if choose.random() < 0.5 else str(value)
    return choose.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value), value * 10**6))


def _torn(file: str, content: bytes, choose: random.Random) -> Mutation:
    at = choose.randrange(len(content))
    torn = {
        "cut": content[:at],
        "empty": b"",
        "an object": b"{}",
        "a list": b"[]",
        "a number": b"1",
        "text": b'"x"',
        "null": b"null",
        "not UTF-8": content[:at] + b"\xff\xfe" + content[at:],
        "a byte changed": content[:at] + bytes([choose.randrange(256)]) + content[at + 1 :],
        "deeply nested": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "a long number": b'{"a":' + b"9" * 5000 + b"}",
    }
    what = choose.choice(sorted(torn))
    return Mutation(file, what, torn[what])


def recipe() -> Recipe:
    """The cheapest one."""
    return parse_recipe("passes: [rtn: {scheme: int4_g16}]\nevaluate: {}", "fuzz")


class Attempt:
    """What `compress`, its dry run and `inspect` do with a model before any work."""

    def __init__(self, folder: Path, order: Recipe) -> None:
        self.folder, self._order = folder, order
        self._map = self._inspected()

    def outcomes(self, *, config_changed: bool) -> list[str]:
        """How each command ends: `fine`, the code of a refusal, or the exception with our line that let it pass."""
        found = []
        if config_changed:
            found.append(_outcome(self._inspected))
        return [*found, _outcome(lambda: self._planned(None if config_changed else self._map))]

    def _inspected(self) -> ModelMap:
        return probe(read_config(self.folder)[0], unfuse=True)

    def _planned(self, model_map: ModelMap | None) -> None:
        source = Source(self.folder, "fuzzed")
        loaded = load_for_compression(source)
        checked = loaded.preflight
        known = KnownModel(source.name, checked, model_map or self._inspected(), loader_of(checked.config))
        make_plan(known, self._order)


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except CompressError as refusal:
        return "BUG" if refusal.exit_code is ExitCode.BUG else refusal.code
    except Exception as problem:
        ours = [frame for frame in traceback.extract_tb(problem.__traceback__) if "llmcompress/" in frame.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"BUG {type(problem).__name__} at {at}: {str(problem).partition(chr(10))[0]:.100}"
    return "fine"


def damaged(attempt: Attempt, mutation: Mutation) -> str:
    """The worst outcome with this file damaged; the folder is afterwards as it was."""
    file = attempt.folder / mutation.file
    before = file.read_bytes()
    file.write_bytes(mutation.content)
    try:
        found = attempt.outcomes(config_changed=mutation.file == "config.json")
    finally:
        file.write_bytes(before)
    return next((each for each in found if each.startswith("BUG")), found[-1])


def main() -> int:
    """Prints every signature with one mutation that shows it; 1 where any is not a CompressError."""
    from tests.tiny_folder import write_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: Counter[str] = Counter()
    examples: dict[str, Mutation] = {}
    folder = Path(tempfile.mkdtemp()) / "model"
    try:
        write_tiny_llama(folder, shard="30KB")
        attempt = Attempt(folder, recipe())
        for mutation in mutations(folder, count=options.count, seed=options.seed):
            ended = damaged(attempt, mutation)
            found[ended] += 1
            examples.setdefault(ended, mutation)
    finally:
        shutil.rmtree(folder.parent)
    for ended, times in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{times:5d}  {ended:60s}  {examples[ended].file}: {examples[ended].what}")
    bugs = {ended: times for ended, times in found.items() if ended.startswith("BUG")}
    print(f"{options.count} mutations, {sum(bugs.values())} bugs, {len(bugs)} signatures")
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
