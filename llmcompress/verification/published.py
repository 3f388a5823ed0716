"""Downloads what a repository of the Hub lists as published by llmcompress, to be verified."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath

from llmcompress.loading.source import find_source
from llmcompress.publishing.hub import asked, hub_api, hub_errors
from llmcompress.storage.names import FILES
from llmcompress.storage.ownership import written_files

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def published_folder(model: str) -> Path:
    """The folder of `ORG/NAME` or `ORG/NAME@REVISION` in the cache, with every file that its lists name.

    Beside the list of the root, every format that was published with others has one in its folder. A repository without
    any is downloaded as a model is for compression.

    Raises: CompressError (exit code 5) when it cannot be had.
    """
    import huggingface_hub

    repository, _, revision = model.partition("@")
    api = hub_api()
    with hub_errors(repository, saved="files that were downloaded completely", downloads=True):
        info = asked(lambda: api.model_info(repository, revision=revision or None))
        there = [each.rfilename for each in info.siblings or ()]
        lists = [name for name in there if PurePosixPath(name).name == FILES and name.count("/") <= 1]
        if not lists:
            return find_source(model).folder
        named: list[str] = []
        for place in lists:
            listed = Path(asked(partial(api.hf_hub_download, repository, place, revision=info.sha)))
            named += [f"{place.removesuffix(FILES)}{each}" for each in written_files(listed.parent)]
        wanted = sorted({name for name in named if _may_be_had(name)} & set(there))
        folder = asked(
            lambda: huggingface_hub.snapshot_download(
                repository, revision=info.sha, allow_patterns=wanted, library_name="llmcompress"
            )
        )
    return Path(folder)


def _may_be_had(name: str) -> bool:
    """No pickles; OpenVINO's weights are called `.bin` too, beside an .xml of the same name."""
    return not name.endswith(_PICKLES) or PurePosixPath(name).name.startswith("openvino_")
