"""Downloads what a repository of the Hub lists as published by llmcompress, to be verified."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from llmcompress.loading.source import find_source
from llmcompress.publishing.hub import asked, hub_api, hub_errors
from llmcompress.storage.names import FILES
from llmcompress.storage.ownership import written_files

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def published_folder(model: str) -> Path:
    """The folder of `ORG/NAME` or `ORG/NAME@REVISION` in the cache, with every file that its list names.

    A repository without such a list is downloaded as a model is for compression.

    Raises: CompressError (exit code 5) when it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = model.partition("@")
    api = hub_api()
    with hub_errors(repository, saved="files that were downloaded completely"):
        info = asked(lambda: api.model_info(repository, revision=revision or None))
        try:
            listed = Path(asked(lambda: api.hf_hub_download(repository, FILES, revision=info.sha)))
        except EntryNotFoundError:
            return find_source(model).folder
        names = [name for name in written_files(listed.parent) if _may_be_had(name)]
        folder = asked(
            lambda: huggingface_hub.snapshot_download(
                repository, revision=info.sha, allow_patterns=names, library_name="llmcompress"
            )
        )
    return Path(folder)


def _may_be_had(name: str) -> bool:
    """No pickles; OpenVINO's weights are called `.bin` too, beside an .xml of the same name."""
    return not name.endswith(_PICKLES) or PurePosixPath(name).name.startswith("openvino_")
