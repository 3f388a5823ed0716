"""What would be published, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from llmcompress.cli.tables import plain_table
from llmcompress.report.forms import size

if TYPE_CHECKING:
    from llmcompress.hub_upload import Outgoing


def outgoing_table(found: Outgoing) -> RenderableType:
    """Every file with its size, and what stays here."""
    rows = [(each.name, size(each.size)) for each in sorted(found.files, key=lambda each: each.name)]
    table = plain_table(("file", "#size"), rows, title="would be published; nothing was sent")
    if not found.left_out:
        return table
    return Group(table, Text(f"not published, for llmcompress did not write it: {', '.join(found.left_out)}"))
