"""Where a recipe publishes: repositories of the Hub, as settings under `publish:`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmcompress.errors import CompressError, ExitCode
from llmcompress.registry import Registry

DESTINATIONS: Registry[HubRepository] = Registry("destination", "llmcompress.publishing.destinations")

MODEL = "model"
"""The artifact that `compress` always makes; the others are called as the targets of `export`."""


@DESTINATIONS.register("hub")
class HubRepository(BaseModel):
    """A model repository on the Hugging Face Hub. The login is that of `hf auth login` or HF_TOKEN."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", examples=["ORG/NAME"])
    """`USER/NAME` or `ORG/NAME`; it is created if it does not exist."""
    private: bool | None = None
    """Whether only you (or the organization) can see it. None: private where it is created, otherwise as it is."""
    revision: str | None = Field(default=None, min_length=1)
    """The branch; None: main. It is created if it does not exist."""
    create_pr: bool = False
    """Open a pull request instead of committing to the branch."""
    message: str = Field(default="Upload a model compressed with llmcompress", min_length=1)
    """The message of the commit."""
    tag: str | None = Field(default=None, min_length=1)
    """A tag for the commit, such as `v1.0`."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """The id of the dense model on the Hub, for the model card; needed where it was read from a local folder."""
    artifacts: tuple[str, ...] | None = Field(default=None, min_length=1)
    """What goes into this repository: `model`, and targets that the recipe exports (`gguf`); None: all of it."""

    @property
    def name(self) -> str:
        """Without its owner."""
        return self.repository.partition("/")[2]

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """`USER/NAME` stands for a repository that gets everything, with the other options at their defaults."""
        return {"repository": text}


def as_repository(repository: str | HubRepository, *, private: bool | None = None) -> HubRepository:
    """The settings, or an id; `private` where it is said.

    Raises: CompressError (exit code 2) for what no repository can be called.
    """
    found = hub_repository(repository) if isinstance(repository, str) else repository
    return found if private is None else found.model_copy(update={"private": private})


def hub_repository(name: str, **options: Any) -> HubRepository:
    """The settings of a repository.

    Raises: CompressError (exit code 2) for what no repository can be called, or a setting that cannot be.
    """
    try:
        return HubRepository(repository=name, **options)
    except ValidationError as problem:
        first = problem.errors()[0]
        if first["loc"] == ("repository",):
            raise _usage(f"{name!r} is not a valid repository id", "use the form ORG/NAME") from problem
        raise _usage(f"{first['loc'][0]}: {first['msg']}", "correct that setting") from problem


def check_destinations(destinations: Iterable[HubRepository], *, exported: Iterable[str], has_output: bool) -> None:
    """That there will be what is to be published; before any work.

    Raises: CompressError (exit code 2) otherwise.
    """
    made = (MODEL, *exported)
    for each in destinations:
        if not has_output:
            raise _usage(
                f"the recipe publishes to {each.repository}, and there is no output folder",
                "name an `output`: what is pushed is that folder, which stays when the Hub fails",
            )
        for name in each.artifacts or ():
            if name not in made:
                what = f"{each.repository} is to get {name!r}, which the recipe does not make"
                raise _usage(what, f"use {' or '.join(made)}, or add it to `export`")
        if each.create_pr and each.revision not in (None, "main"):
            what = f"a pull request cannot be opened against the branch {each.revision!r}"
            raise _usage(what, "leave `revision` out: the Hub opens pull requests against main")


def _usage(what: str, fix: str) -> CompressError:
    return CompressError("publish.settings", what, where="publish", fix=fix, exit_code=ExitCode.USAGE)
