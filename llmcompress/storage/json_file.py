"""Reads JSON files written by others: returns an object, or raises an error that locates the problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError, ExitCode

GET_AGAIN = "correct the file, or download it again"


def read_json(
    file: Path, *, code: str = "model.bad-json", fix: str = GET_AGAIN, exit_code: ExitCode = ExitCode.REFUSED
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: CompressError naming the file, line, column and what was found, for anything else.
    """

    def refused(what: str, place: str = "") -> CompressError:
        return CompressError(code, f"{file.name} {what}", where=f"{file}{place}", fix=fix, exit_code=exit_code)

    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
        found = json.loads(text)
    except OSError as problem:
        raise refused(f"cannot be read: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        column = problem.start - (content.rfind(b"\n", 0, problem.start) + 1) + 1
        what = f"is not UTF-8 text: found the byte 0x{content[problem.start]:02x}"
        raise refused(what, f", line {line}, column {column}") from None
    except json.JSONDecodeError as problem:
        rest = problem.doc[problem.pos : problem.pos + 20]
        what = f"is not JSON: {problem.msg}, found {rest!r}" if rest else f"is not JSON: {problem.msg}, found the end"
        raise refused(what, f", line {problem.lineno}, column {problem.colno}") from None
    except RecursionError:
        raise refused("cannot be used: its JSON is nested too deeply") from None
    except ValueError:  # Python's limit for the digits of one number
        raise refused("cannot be used: a number in its JSON has too many digits") from None
    if not isinstance(found, dict):
        raise refused(f"must contain a JSON object, but contains {_kind(found)}", ", line 1")
    return found


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
