"""`write`: keeps the rows in a file of the user's, for other runs and for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools
from llmcompress.storage.atomic import replacing
from llmcompress.storage.disk import disk_errors
from llmcompress.storage.paths import from_home


@STEPS.register("write")
class Write(DataStep):
    """Write the rows into a JSONL file, which is replaced as a whole, and pass them on."""

    file: str = Field(min_length=1, pattern=r"\.jsonl$")
    """A name that ends in .jsonl; `read: {source: …}` reads it again."""

    @override
    def units(self, given: Sequence[Row]) -> int:
        return 1

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        path = from_home(self.file)
        with disk_errors(path, saved="the rows in the run folder: run the same command again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as part:
                part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
        return list(given)
