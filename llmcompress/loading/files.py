"""Which files of a folder belong to the model, and whether they can be trusted; no weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmcompress.errors import CompressError
from llmcompress.storage.json_file import read_json
from llmcompress.storage.names import INDEX, SINGLE


def weight_files(folder: Path, *, how_to_get_again: str) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and for a sharded checkpoint which file holds which tensor.

    Raises: CompressError when it is not certain which files are meant, or one is missing or outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        require_safetensors([path.name for path in folder.iterdir()], where=str(folder))
        refuse_outside(folder, {SINGLE: SINGLE})
        return [folder / SINGLE], {}
    weight_map = read_index(index)
    named = sorted(set(weight_map.values()))
    refuse_outside(folder, {file: f"{INDEX}: weight_map entry {file!r}" for file in named})
    if (folder / SINGLE).exists() and SINGLE not in named:
        raise CompressError(
            "model.ambiguous",
            f"the folder has both {SINGLE} and {INDEX}, and the index does not list that file",
            where=str(folder),
            fix="two checkpoints are mixed in this folder: delete the one that does not belong",
        )
    missing = [file for file in named if not (folder / file).exists()]
    if missing:
        raise CompressError(
            "model.missing-file",
            f"{len(missing)} of {len(named)} weight files are missing",
            where=", ".join(missing),
            fix=how_to_get_again.replace("delete it and ", ""),
        )
    return [folder / file for file in named], weight_map


def require_safetensors(names: Iterable[str], *, where: str) -> None:
    """Refuse a folder or repository without safetensors weights, given its file names.

    Raises: CompressError saying what is there instead and how to convert it safely.
    """
    names = [name for name in names if "/" not in name]
    if "adapter_config.json" in names:
        raise adapter_error(where)
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    gguf = [name for name in names if name.endswith(".gguf")]
    loose = [name for name in names if name.endswith(".safetensors")]
    if loose:
        what, there = f"there are safetensors files but neither {SINGLE} nor {INDEX}", loose
        fix = f"download {INDEX} too, or rename a single weight file to {SINGLE}"
    elif pickles:
        what, there = "the weights are pickle files, which can execute code when loaded", pickles
        fix = (
            "use a revision with safetensors (often a pull request: ORG/NAME@refs/pr/N), or convert it on the Hub: "
            "https://huggingface.co/spaces/safetensors/convert"
        )
    elif gguf:
        what, there = "the weights are GGUF, an inference format that is already quantized", gguf
        fix = "use the original model in safetensors format"
    else:
        what, there, fix = (
            f"there are no weights: neither {SINGLE} nor {INDEX}",
            [],
            "give the folder of a complete model",
        )
    found = f" ({shortened_list(sorted(there))})" if there else ""
    raise CompressError("model.no-safetensors", what + found, where=where, fix=fix)


def adapter_error(where: str, base: str = "BASE") -> CompressError:
    """An adapter is a difference to a model, not a model."""
    return CompressError(
        "model.adapter",
        "this is an adapter (adapter_config.json), not a whole model",
        where=where,
        fix=(
            f"merge it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), ADAPTER)"
            ".merge_and_unload().save_pretrained(FOLDER)"
        ),
    )


def refuse_outside(folder: Path, files: dict[str, str]) -> None:
    """Refuse file names (with what to call each) that lead out of the folder, by `..`, as a path, or through a link.

    The Hub's cache links from snapshots/COMMIT to blobs of the same repository: those links are its storage.

    Raises: CompressError naming every such entry.
    """
    real = folder.resolve()
    inside = next((each.parent for each in real.parents if _is_cached_repository(each)), real)
    outside = [
        called
        for file, called in files.items()
        if Path(file).name != file or not (folder / file).resolve().is_relative_to(inside)
    ]
    if outside:
        raise CompressError(
            "model.outside-folder",
            "the checkpoint refers to files outside the model's folder",
            where=shortened_list(outside),
            fix="do not use this model unless you trust it; copy the real files into the folder (no links, no paths)",
        )


def _is_cached_repository(snapshots: Path) -> bool:
    """Whether a folder holds the snapshots of a repository; the model is one of them, or a format below one."""
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def read_index(index: Path) -> dict[str, str]:
    """Which file holds which tensor.

    Raises: CompressError when the index is no such table or lies outside the folder.
    """
    refuse_outside(index.parent, {INDEX: INDEX})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise CompressError(
            "model.bad-index", "the index has no usable `weight_map`", where=str(index), fix="download the file again"
        )
    return weight_map


def _is_name(file: object) -> bool:
    """What a file system can be asked for at all."""
    return isinstance(file, str) and 0 < len(file.encode(errors="replace")) <= 255 and "\x00" not in file


def shortened_list(names: list[str], most: int = 12) -> str:
    """The names in one line, the first few when there are many."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
