"""Whether the login may publish to a repository, asked without changing anything: before the work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.errors import CompressError, ExitCode
from llmcompress.publishing.destinations import HubRepository
from llmcompress.publishing.hub import asked, hub_api, hub_error, hub_errors, takes

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Repository:
    """A repository as it is now."""

    exists: bool
    private: bool = True


def check_all_rights(wanted: Iterable[HubRepository]) -> None:
    """Of everything that a recipe publishes.

    Raises: CompressError as `check_rights` does.
    """
    for each in wanted:
        check_rights(hub_api(), each)


def check_rights(api: HfApi, wanted: HubRepository) -> Repository:
    """Who is logged in, whether that may write there, and whether the repository is as private as asked.

    Raises: CompressError (exit code 5) when not; (2) where the repository has another visibility than asked for.
    """
    with hub_errors(wanted.repository, saved="nothing was sent"):
        who = asked(api.whoami)
        found = _repository(api, wanted)
        token = (who.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise hub_error("forbidden", "the token of this login can only read", fix=_NEW_TOKEN)
        if not wanted.create_pr:
            _check_namespace(who, wanted.repository)
            _check_scopes(token, wanted.repository)
            if found.exists and takes(api.auth_check, "write"):
                asked(lambda: api.auth_check(wanted.repository, write=True))
    if wanted.create_pr and not found.exists:
        what = f"there is no repository {wanted.repository} to open a pull request for"
        raise hub_error("not-found", what, fix="check the name, or push without a pull request: that creates it")
    if found.exists and wanted.private is not None and wanted.private != found.private:
        is_, asked_for = ("private", "public") if found.private else ("public", "private")
        what = f"{wanted.repository} exists and is {is_}, and {asked_for} was asked for"
        fix = f"change it in the repository's settings on the Hub, choose another name, or do not ask for {asked_for}"
        raise CompressError("publish.visibility", what, fix=fix, exit_code=ExitCode.USAGE)
    return found


def _repository(api: HfApi, wanted: HubRepository) -> Repository:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = asked(lambda: api.model_info(wanted.repository))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Repository(exists=False)
    return Repository(exists=True, private=bool(found.private))


def _check_namespace(who: Mapping[str, Any], repository: str) -> None:
    """The user's own, or an organization where the user is more than a reader."""
    name, namespace = str(who.get("name")), repository.partition("/")[0]
    orgs = {str(each.get("name")): each for each in who.get("orgs") or ()}
    if namespace == name:
        return
    if namespace not in orgs:
        known = " and ".join([name, *sorted(orgs)])
        what = f"the login is {name}, which may not publish under {namespace}"
        raise hub_error("forbidden", what, fix=f"use {known}, or log in as a member of {namespace}: `hf auth login`")
    if orgs[namespace].get("roleInOrg") == "read":
        what = f"{name} may only read in {namespace}"
        raise hub_error("forbidden", what, fix=f"ask an administrator of {namespace} for write access")


_NEW_TOKEN = "make a token with write access at https://huggingface.co/settings/tokens, then `hf auth login`"


def _check_scopes(token: Mapping[str, Any], repository: str) -> None:
    """A fine-grained token says for whom it was made: found here, and not after hours of work."""
    if token.get("role") == "fineGrained":
        scoped = (token.get("fineGrained") or {}).get("scoped") or ()
        names = (repository, repository.partition("/")[0])
        granted = [
            str(right)
            for scope in scoped
            if (scope.get("entity") or {}).get("name") in names
            for right in scope.get("permissions") or ()
        ]
        if not any(right.startswith("repo.") and "write" in right for right in granted):
            raise hub_error(
                "forbidden", f"the token of this login has no right to write to {repository}", fix=_NEW_TOKEN
            )
