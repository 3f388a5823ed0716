"""Datasets from the Hub (and dataset folders): short names, streaming, and errors that say what to do offline."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from llmcompress.errors import CompressError, ExitCode

BUILTIN_HINT = "use `builtin:calibration` or `builtin:evaluation`, which need no network"


@dataclass(frozen=True)
class Alias:
    """A short name for a dataset that papers use, with the settings they use it with."""

    path: str
    config: str | None = None
    streamed: bool = True
    """Read from the start as far as needed, instead of downloading all of it."""
    articles: bool = False
    """Rows are lines; an article begins at a heading `= Title =`."""
    revision: str | None = None
    """Where the rows are, if not on the main branch."""


ALIASES = {
    "wikitext2": Alias("Salesforce/wikitext", "wikitext-2-raw-v1", streamed=False, articles=True),
    "wikitext103": Alias("Salesforce/wikitext", "wikitext-103-raw-v1", articles=True),
    "c4": Alias("allenai/c4", "en"),
    # published as a script; the Hub's own conversion holds the same rows
    "ptb": Alias("ptb-text-only/ptb_text_only", "penn_treebank", streamed=False, revision="refs/convert/parquet"),
    "pile": Alias("mit-han-lab/pile-val-backup"),
    "fineweb_edu": Alias("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


@dataclass(frozen=True)
class HubPart:
    """Which rows of a dataset: its split, and where they are not the usual ones, its configuration and revision."""

    split: str
    config: str | None = None
    revision: str | None = None


def hub_rows(source: str, part: HubPart, *, max_characters: int | None, where: str) -> Iterator[tuple[str, Any]]:
    """Labelled rows of a Hub dataset, a short name of `ALIASES`, or a local dataset folder.

    With `max_characters` only what the caller takes is downloaded, unless the dataset is small or the machine offline.

    Raises: CompressError `data.offline`, `data.not-found`, `data.script`, `data.split`, `data.endless`, `data.hub`.
    """
    alias = ALIASES.get(source, Alias(source))
    local = Path(source).is_dir()
    offline = _offline(source, alias, where)
    if max_characters is None and source in ALIASES and alias.streamed:
        raise CompressError(
            "data.endless",
            f"{source}: this dataset is very large and no limit is set",
            where=where,
            fix="limit what is read: `max_windows` of an evaluation, `most` of the step `read`",
            exit_code=ExitCode.USAGE,
        )
    streaming = alias.streamed and max_characters is not None and not local and not offline
    rows = _load(alias, part, streaming=streaming, where=where)
    rows = _guarded(rows, alias.path, where)
    if alias.articles:
        return _articles(row["text"] for row in rows)
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def hub_dataset(source: str, *, split: str, config: str | None, streaming: bool, where: str) -> Any:
    """A Hub dataset, a short name of `ALIASES`, or a local dataset folder, as `datasets` has it; streamed if asked.

    Raises: CompressError as `hub_rows` does.
    """
    alias = ALIASES.get(source, Alias(source))
    _offline(source, alias, where)
    return _load(alias, HubPart(split, config), streaming=streaming, where=where)


def _offline(source: str, alias: Alias, where: str) -> bool:
    """Whether only the local cache can answer.

    Raises: CompressError where it cannot.
    """
    offline = not Path(source).is_dir() and not hub_reachable()
    if offline and not _in_cache(alias.path):
        raise CompressError(
            "data.offline",
            f"{source}: this dataset is not in the local cache and the Hub cannot be reached",
            where=where,
            fix=f"{BUILTIN_HINT}; or go online once, or give a local .txt or .jsonl file",
            exit_code=ExitCode.HUB,
        )
    return offline


def hub_reachable() -> bool:
    """False in offline mode and where the Hub's name cannot be resolved: this avoids waiting for retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if getproxies():
        return True  # the proxy resolves names, this machine need not
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _in_cache(path: str) -> bool:
    """Whether `datasets` prepared that dataset before (it names its folder so)."""
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()


def _load(alias: Alias, part: HubPart, *, streaming: bool, where: str) -> Iterable[dict[str, Any]]:
    import datasets

    path, revision = alias.path, part.revision or alias.revision
    chosen = {} if revision is None else {"revision": revision}
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            path, part.config or alias.config, split=part.split, streaming=streaming, **chosen
        )
        return rows
    except FileNotFoundError as failure:
        raise _not_found(path, "gated" in str(failure), where) from failure
    except RuntimeError as failure:
        if "script" not in str(failure):
            raise _hub_failure(path, failure, where) from failure
        raise CompressError(
            "data.script",
            f"{path}: this dataset needs its own Python loading script, which is never run",
            where=where,
            fix='save the text as .jsonl, one {"text": ...} per line, and use that file',
        ) from failure
    except ValueError as failure:
        # unknown split or configuration: the library's own message lists what there is
        raise CompressError(
            "data.split", f"{path}: {_first_line(failure)}", where=where, fix="set `split` or `config` to one of those"
        ) from failure
    except (OSError, datasets.exceptions.DatasetsError) as failure:
        raise _hub_failure(path, failure, where) from failure


def _not_found(path: str, gated: bool, where: str) -> CompressError:
    if gated:
        fix = "request access on the dataset's page, then `hf auth login`"
        return CompressError("data.gated", f"{path}: access to this dataset must be requested", where=where, fix=fix)
    fix = f"check the name (short names: {', '.join(ALIASES)}); for a private dataset `hf auth login`"
    return CompressError("data.not-found", f"{path}: no such file or Hub dataset", where=where, fix=fix)


def _guarded(rows: Iterable[dict[str, Any]], path: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows, with one error for whatever breaks while they are fetched."""
    try:
        yield from rows
    except Exception as failure:  # from one of four network libraries, which share no type
        raise _hub_failure(path, failure, where) from failure


def _hub_failure(path: str, failure: Exception, where: str) -> CompressError:
    return CompressError(
        "data.hub",
        f"{path}: {_first_line(failure)}",
        where=where,
        fix=f"run the command again; {BUILTIN_HINT}",
        exit_code=ExitCode.HUB,
    )


def _first_line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:300]


def _articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Join rows with two newlines, as the published perplexities do, one text per article.

    Joining the articles with two newlines again gives exactly the text that joining all rows gives.
    """
    article: list[str] = []
    count = 0
    for line in lines:
        if article and re.match(r" = [^=].* = \n?$", line):
            count += 1
            yield f"article {count}", "\n\n".join(article)
            article = []
        article.append(line)
    if article:
        yield f"article {count + 1}", "\n\n".join(article)
