"""`llmcompress doctor`: what is installed, what is missing, and the exact command that brings it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from llmcompress.cli.output import json_option, print_json, print_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from llmcompress.environments.doctor import Checkup


@click.command()
@click.option("--build", "names", metavar="NAME", multiple=True, help="Build an environment now. Repeatable.")
@json_option
def doctor(names: tuple[str, ...], as_json: bool) -> None:
    """Show Python, packages, devices, disk, extras, runtimes, and the environments of export tools.

    Some targets are written by tools whose packages clash with those that are installed here. They get a virtual
    environment of their own in the cache, built by the first export that needs it, or now by --build.

    \b
    Examples:
      llmcompress doctor
      llmcompress doctor --build optimum-onnx
    """
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.environments.doctor import checkup
    from llmcompress.environments.known import environment_called
    from llmcompress.environments.use import python

    wanted = [environment_called(name) for name in names]
    with TerminalProgress() as progress:
        if wanted:
            progress.stage("build environments", len(wanted))
        for environment in wanted:
            python(environment, progress=progress)
            progress.step(environment.name)
    found = checkup()
    print_json(asdict(found)) if as_json else print_tables(*_tables(found))


def _tables(found: Checkup) -> list[RenderableType]:
    from llmcompress.cli.tables import plain_table
    from llmcompress.report.forms import size

    facts = [
        ("python", f"{found.python}  {found.interpreter}"),
        *((name, version or "not installed") for name, version in found.packages.items()),
        *(("device", device) for device in found.devices),
        ("cache", f"{found.cache} ({size(found.free_bytes)} free)"),
    ]
    extras = [
        (each.name, _versions(each.installed), "; ".join(each.missing), each.install or "") for each in found.extras
    ]
    environments = [
        (
            each.name,
            each.state if each.bytes_on_disk is None else f"{each.state}, {size(each.bytes_on_disk)}",
            each.purpose,
            each.build or each.folder or "",
        )
        for each in found.environments
    ]
    runtimes = [(name, version or "not found") for name, version in found.runtimes.items()]
    return [
        plain_table(("", ""), facts),
        plain_table(("extra", "installed", "missing", "command"), extras, title="extras"),
        plain_table(("environment", "state", "for", "folder, or command"), environments, title="environments"),
        plain_table(("", ""), runtimes, title="runtimes"),
    ]


def _versions(installed: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in installed.items())
