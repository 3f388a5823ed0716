"""Pushes that are killed at requests of the Hub, before, in the middle of and after them, and typed again.

Part of `kills.py`. The Hub is a double over real HTTP on loopback (`tests/hub/server.py`). Every second push replaces a
model that is there already. Whoever reads the repository sees what was there before or the whole new model.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from forked import Forked, ForkServer
from kill_rows import Row

from tests.hub.server import TOKEN, Handler, HubDouble, Repo

PUSH = "push"
NAME = "me/small"
OLD = {
    "config.json": b"{}",
    "model.safetensors": b"old weights",
    "llmcompress_files.json": b'{"files": {"config.json": null, "model.safetensors": null}}',
    "theirs.txt": b"somebody wrote this",
}
"""Of an earlier push, and of someone else."""
MOST_KILLS = 3


@contextmanager
def push_place(folder: Path, also: Path, scratch: Path) -> Iterator[PushPlace]:
    """Two folders that are pushed as one repository."""
    with HubDouble().running() as hub, ForkServer(_environment(hub, scratch)) as server:
        hub.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections of the killed break
        yield PushPlace(hub, server, folder, also)


@dataclass
class PushPlace:
    """A Hub, and processes that push to it."""

    hub: HubDouble
    server: ForkServer
    folder: Path
    also: Path
    _peaceful: dict[bool, tuple[Repo, int, float]] = field(default_factory=dict)
    """Into a new repository, or not: what an uninterrupted push leaves, its requests and seconds."""
    _pushed: int = 0

    def killed(self, draw: random.Random) -> Row:
        """One push, killed up to `MOST_KILLS` times and typed again."""
        self._pushed += 1
        replaces = self._pushed % 2 == 0
        wanted, requests, seconds = self._in_peace(replaces)
        row = Row(PUSH, seconds_in_peace=seconds)
        self._begin(replaces)
        for _ in range(draw.randint(1, MOST_KILLS)):
            how, number = draw.choice(tuple(KILLERS)), draw.randrange(requests)
            began = time.monotonic()
            _, killed_at = self._run(kill=(len(self.hub.requests) + number, KILLERS[how]))
            self._look(wanted, row)
            if killed_at is None:
                break  # it had less to do this time, and is finished
            row.kills.append(round(time.monotonic() - began, 2))
            row.moments.append(f"{how} {killed_at}")
        began = time.monotonic()
        (code, said), _ = self._run()
        row.seconds_of_last = round(time.monotonic() - began, 2)
        self._look(wanted, row)
        if code:
            row.differing.append(f"exit code {code}: {said.strip()[-300:]}")
        row.differing += _differing(wanted, self.hub.repos[NAME])
        row.same = not row.differing
        return row

    def _in_peace(self, replaces: bool) -> tuple[Repo, int, float]:
        """The repository after an uninterrupted push, its requests and seconds."""
        if replaces not in self._peaceful:
            self._begin(replaces)
            began = time.monotonic()
            (code, said), _ = self._run()
            if code:
                raise SystemExit(f"push failed when nothing disturbed it:\n{said}")
            seconds = round(time.monotonic() - began, 2)
            self._peaceful[replaces] = self.hub.repos[NAME], len(self.hub.requests), seconds
        return self._peaceful[replaces]

    def _begin(self, replaces: bool) -> None:
        """An empty Hub, or one with a model in that place."""
        for held in (self.hub.repos, self.hub.stored, self.hub.requests):
            held.clear()
        if replaces:
            self.hub.add(NAME, dict(OLD))

    def _run(self, *, kill: tuple[int, Killer] | None = None) -> tuple[tuple[int, str], str | None]:
        """Exit code and errors; and the request at which it was killed."""
        at: list[str] = []
        running: list[Forked] = []

        def act(handler: Handler) -> None:
            assert kill is not None
            at.append(f"{handler.method} {handler.route.replace(NAME, 'NAME')}"[:60])
            kill[1](handler, lambda: os.killpg(running[0].pid, signal.SIGKILL))

        self.hub.moments = {} if kill is None else {kill[0]: act}
        words = [PUSH, str(self.folder), NAME, "--also", str(self.also), "--public", "--tag", "v1"]
        running.append(self.server.start(words, folder=self.folder.parent))
        ended = running[0].ended()
        self.hub.moments = {}
        return ended, (at[0] if at else None)

    def _look(self, wanted: Repo, row: Row) -> None:
        """A reader sees the old or the new: every commit that was ever made is one of them."""
        repo = self.hub.repos.get(NAME)
        for sha, files in repo.commits.items() if repo else ():
            if files not in wanted.commits.values():
                row.partial.append(f"commit {sha[:8]} with {len(files)} files")


Killer = Callable[[Handler, Callable[[], None]], None]


def _before(handler: Handler, kill: Callable[[], None]) -> None:
    kill()
    handler.hang_up()


def _in_the_middle(handler: Handler, kill: Callable[[], None]) -> None:
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0) // 2)
    kill()
    handler.close_connection = True


def _after(handler: Handler, kill: Callable[[], None]) -> None:
    """What was asked for is done, and nobody is there to hear of it."""
    handler.send = lambda *_: None  # type: ignore[method-assign]
    handler.handle_one(handler.method)
    kill()
    handler.close_connection = True


KILLERS: Mapping[str, Killer] = {
    "before": _before,
    "in the middle of": _in_the_middle,
    "after": _after,
}


def _differing(wanted: Repo, left: Repo) -> list[str]:
    names = wanted.files.keys() | left.files.keys()
    found = sorted(name for name in names if wanted.files.get(name) != left.files.get(name))
    if left.tags.get("v1") != left.branches["main"]:
        found.append("the tag v1")
    if left.private != wanted.private:
        found.append("its visibility")
    if len(left.commits) != len(wanted.commits):
        found.append(f"{len(left.commits)} commits")
    return found


def _environment(hub: HubDouble, scratch: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(scratch / "home"),
        "HF_TOKEN": TOKEN,
        "LLMCOMPRESS_CACHE": str(scratch / "cache"),
    }
