"""Maps every failure of a command to an exit code and a short text or a JSON object; tracebacks go to a file."""

from __future__ import annotations

import errno
import io
import json
import sys
import tempfile
import traceback

import click

from llmcompress.cli.flags import with_flags
from llmcompress.errors import CompressError, ExitCode, is_out_of_memory, saved_of, without_tokens


def report_failure(failure: Exception, *, as_json: bool, terminated: bool = False) -> int:
    """Tell the user and return the exit code: JSON on stdout, otherwise text on stderr.

    `terminated`: it was SIGTERM that interrupted the work.
    """
    known = _as_known(failure)
    known.fix = with_flags(known.fix)
    if terminated and known.exit_code is ExitCode.INTERRUPTED:
        known.exit_code = ExitCode.TERMINATED
    if as_json:
        click.echo(without_tokens(json.dumps({"error": known.as_dict()}, ensure_ascii=False)))
    elif isinstance(failure, click.ClickException):
        shown = io.StringIO()
        failure.show(shown)
        click.echo(without_tokens(shown.getvalue()), nl=False, err=True)
    else:
        _show(known)
    return int(known.exit_code)


def _show(error: CompressError) -> None:
    from rich.console import Console
    from rich.text import Text

    word = "interrupted" if error.exit_code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED) else "error"
    message = Text(without_tokens(str(error)))
    # soft_wrap: paths and commands must stay copyable
    Console(file=sys.stderr).print(Text(f"{word}: ", style="bold red") + message, soft_wrap=True)


def _as_known(failure: Exception) -> CompressError:
    """The same failure in the one shape that users meet."""
    if isinstance(failure, CompressError):
        return failure
    if isinstance(failure, click.Abort):
        return CompressError("interrupted", "stopped", saved="", exit_code=ExitCode.INTERRUPTED)
    if isinstance(failure, click.ClickException):
        return CompressError("usage", failure.format_message(), exit_code=ExitCode.USAGE)
    if is_out_of_memory(failure):
        fix = "use a smaller `calibration.batch` or `calibration.tokens`, or `--device cpu`, and run the command again"
        return _out_of("memory", failure, fix)
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return _out_of("disk space", failure, "free disk space and run the command again")
    return CompressError(
        "bug",
        f"{type(failure).__name__}: {_first_line(failure)}",
        where=_write_log(failure),
        fix="this is a bug in llmcompress: please report it with that file",
        saved=saved_of(failure) or "finished blocks, if any: run the same command again to resume",
        exit_code=ExitCode.BUG,
    )


def _out_of(what: str, failure: Exception, fix: str) -> CompressError:
    return CompressError(
        f"out-of-{what.partition(' ')[0]}",
        f"out of {what}: {_first_line(failure)}",
        where=_write_log(failure),
        fix=fix,
        saved=saved_of(failure) or "finished blocks, if any: run the same command again to resume",
        exit_code=ExitCode.RESOURCES,
    )


def _write_log(failure: Exception) -> str:
    """Write the traceback to a new file and return its path."""
    text = "".join(traceback.format_exception(failure))
    with tempfile.NamedTemporaryFile("w", prefix="llmcompress-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(without_tokens(text))
    return file.name


def _first_line(failure: Exception) -> str:
    return without_tokens(str(failure)).strip().partition("\n")[0][:300]
