"""The error that users see: what happened, where, what to do, and what is saved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line returns; documented in the README and stable."""

    OK = 0
    BUG = 1
    USAGE = 2
    """The command line or the recipe is wrong."""
    REFUSED = 3
    """The model, the data or the environment was refused before any work."""
    RESOURCES = 4
    """Memory or disk ran out; state is saved and the run can be resumed."""
    HUB = 5
    """The Hub or the network failed; run the command again."""
    GATE = 6
    """The result is worse than the recipe allows; it is kept and not published."""
    INTERRUPTED = 130
    TERMINATED = 143
    """Told to end by SIGTERM; state is saved as after an interrupt."""


NOTHING_SAVED = "nothing was written"
"""What errors say about saved work unless a more specific text is given."""


class CompressError(ValueError):
    """Anything a user can cause or fix.

    `code` is a short stable name such as `recipe.unknown-key`; `where` names the file, key or tensor;
    `fix` is an instruction; `saved` says what of the work so far is kept.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        saved: str = NOTHING_SAVED,
        exit_code: ExitCode = ExitCode.REFUSED,
    ) -> None:
        self.code, self.what, self.where = code, without_tokens(what), without_tokens(where)
        self.fix, self.saved = without_tokens(fix), without_tokens(saved)
        self.exit_code = exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        rows = [("where", self.where), ("fix", self.fix), ("saved", self.saved)]
        return "\n".join([f"{self.what} [{self.code}]", *(f"  {name}: {text}" for name, text in rows if text)])

    def as_dict(self) -> dict[str, str | int]:
        """The same facts for `--json`."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "saved": self.saved,
            "exit_code": int(self.exit_code),
        }


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out: Python's error, the GPU's, or the RuntimeError by which torch's CPU allocator says so."""
    if isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError":
        return True
    said = str(failure)
    return isinstance(failure, RuntimeError) and ("DefaultCPUAllocator" in said or "t allocate memory" in said)


def near_names(word: str, known: Iterable[str], *, count: int = 1) -> list[str]:
    """The known names that look most like a word, best first; none when nothing does."""
    names = list(known)
    plain = word.replace("_", "").replace("-", "")
    near = difflib.get_close_matches(word, names, n=count, cutoff=0.55)
    return near or [name for name in names if name.replace("_", "").replace("-", "") == plain][:count]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown word: the nearest known name, or all names where none is near."""
    names = list(known)
    near = near_names(word, names)
    return f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(names)}"


_SAVED = "saved: "


def note_saved(error: BaseException, saved: str) -> None:
    """Add to any error what of the work so far is kept; Python shows it below the error."""
    error.add_note(f"{_SAVED}{saved}")


def saved_of(error: BaseException) -> str | None:
    """What `note_saved` added; None: nothing."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_SAVED)]
    return notes[-1].removeprefix(_SAVED) if notes else None


_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_(?!transfer\b)(?:oauth_|jwt_)?[A-Za-z0-9]{8,}")
_PASSWORD = re.compile(r"(?<=://)[^/@\s\"'<>]+@")
"""User and password at the beginning of an address."""


def without_tokens(text: str) -> str:
    """Text for a screen or a file: access tokens and passwords in addresses are replaced by stars."""
    return _TOKEN.sub(r"\1_***", _PASSWORD.sub("***@", text))
