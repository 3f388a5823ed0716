"""Brings a repository to hold given files: one commit of what differs, unless someone else changed it meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.publishing.destinations import HubRepository
from llmcompress.publishing.hub import BUSY, FAILED, asked, hub_error, refusal_of
from llmcompress.publishing.outgoing import OutgoingFile
from llmcompress.storage.names import CARD, FILES
from llmcompress.storage.ownership import written_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
"""A loader takes the first that it finds: what an earlier upload left would be loaded in the place of ours."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, by what git or the file store calls its content."""

    blob_id: str
    sha256: str | None
    """None: git holds it."""

    def is_same(self, file: OutgoingFile) -> bool:
        """Whether it holds the same bytes."""
        return self.sha256 == file.sha256 if self.sha256 else self.blob_id == file.blob_id


@dataclass(frozen=True)
class Head:
    """A branch as it is now."""

    commit: str | None
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Pushed:
    """What came of it."""

    url: str
    commit: str | None
    changed: tuple[str, ...]
    """Paths that were sent; empty: the repository held exactly this already, and no commit was made."""
    removed: tuple[str, ...]
    """Paths of an earlier upload that would be loaded in the place of these files."""
    pull_request: str | None = None


def head_of(api: HfApi, wanted: HubRepository) -> Head:
    """The branch that is pushed to, created from main where there is none of that name."""
    from huggingface_hub.errors import RevisionNotFoundError

    branch = wanted.revision or MAIN
    try:
        info = asked(lambda: api.model_info(wanted.repository, revision=branch))
    except RevisionNotFoundError:
        if branch == MAIN:  # a repository without a commit
            return Head(None, {})
        asked(lambda: api.create_branch(wanted.repository, branch=branch, exist_ok=True))
        info = asked(lambda: api.model_info(wanted.repository, revision=branch))
    listed = asked(lambda: list(api.list_repo_tree(wanted.repository, recursive=True, revision=info.sha)))
    return Head(info.sha, {entry.path: _remote(entry) for entry in listed if hasattr(entry, "blob_id")})


def text_at(api: HfApi, wanted: HubRepository, head: Head, name: str) -> Path | None:
    """A small file of the branch; None where there is none."""
    if name not in head.files:
        return None
    return Path(asked(lambda: api.hf_hub_download(wanted.repository, name, revision=head.commit)))


def commit_files(api: HfApi, wanted: HubRepository, head: Head, files: Sequence[OutgoingFile]) -> Pushed:
    """One commit on top of `head`, or a pull request; nothing where the branch holds the same already.

    Large files are uploaded first: those that the Hub has are not sent again, so a push that broke off continues.

    Raises: CompressError `hub.changed` when the branch moved meanwhile; errors of huggingface_hub.
    """
    changed, removed = _difference(api, wanted, head, files)
    url = f"{api.endpoint}/{wanted.repository}"
    if not changed and not removed:
        return Pushed(url, head.commit, (), ())
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [
        CommitOperationAdd(each.name, each.content if isinstance(each.content, bytes) else str(each.content))
        for each in changed
    ]
    branch = wanted.revision or MAIN
    place: dict[str, Any] = {"revision": branch, "create_pr": wanted.create_pr}
    asked(lambda: api.preupload_lfs_files(wanted.repository, additions, free_memory=False, **place))
    names = tuple(each.name for each in changed)
    try:
        made = asked(
            lambda: api.create_commit(
                wanted.repository,
                [*additions, *(CommitOperationDelete(name) for name in removed)],
                commit_message=wanted.message,
                parent_commit=head.commit,
                **place,
            ),
            # with a parent, a second commit of the same cannot be made; a second pull request can
            again=BUSY if wanted.create_pr else FAILED,
        )
    except Exception as problem:
        refusal = refusal_of(problem)
        if refusal is None or refusal.status != 412:
            raise
        now = head_of(api, wanted)
        if any(_difference(api, wanted, now, files)):
            what = f"{wanted.repository} was changed while this was uploaded: {branch} is at {str(now.commit)[:12]} now"
            fix = "look at what changed there, then push again, or open a pull request instead"
            raise hub_error(
                "changed", what, fix=fix, saved="the large files are uploaded; no commit was made"
            ) from problem
        return Pushed(url, now.commit, names, removed)  # the answer to our first request was lost
    return Pushed(url, made.oid, names, removed, made.pr_url)


def tag_commit(api: HfApi, wanted: HubRepository, commit: str) -> None:
    """Name a commit.

    Raises: CompressError when another one has that name.
    """
    assert wanted.tag is not None
    tag = wanted.tag
    refs = asked(lambda: api.list_repo_refs(wanted.repository))
    there = {each.name: each.target_commit for each in refs.tags}
    if tag not in there:
        asked(lambda: api.create_tag(wanted.repository, tag=tag, revision=commit))
    elif there[tag] != commit:
        what = f"the tag {tag} of {wanted.repository} names another commit, {there[tag][:12]}"
        saved = f"everything: the files are published as commit {commit[:12]}"
        raise hub_error("tag", what, fix="choose another tag", saved=saved)


def _difference(
    api: HfApi, wanted: HubRepository, head: Head, files: Sequence[OutgoingFile]
) -> tuple[list[OutgoingFile], tuple[str, ...]]:
    """What the branch lacks or holds otherwise, and what an earlier upload left there."""
    changed = [each for each in files if each.name not in head.files or not head.files[each.name].is_same(each)]
    outgoing = {each.name for each in files}
    earlier = _earlier(api, wanted, head, outgoing)
    weights = any(fnmatchcase(name, "model*.safetensors") for name in outgoing)
    left = (
        name
        for name in head.files
        if name not in outgoing
        and name != CARD
        and (name in earlier or (weights and any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)))
    )
    return changed, tuple(sorted(left))


def _earlier(api: HfApi, wanted: HubRepository, head: Head, outgoing: Collection[str]) -> set[str]:
    """Paths that an earlier upload listed as its own, in the folders that are written now."""
    found: set[str] = set()
    for name in outgoing:
        folder, _, last = name.rpartition("/")
        listed = text_at(api, wanted, head, name) if last == FILES else None
        if listed is not None:
            found |= {f"{folder}/{each}" if folder else each for each in written_files(listed.parent)}
    return found


def _remote(entry: Any) -> RemoteFile:
    return RemoteFile(str(entry.blob_id), entry.lfs.sha256 if entry.lfs else None)
