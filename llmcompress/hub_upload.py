"""Publishes finished folders to a repository on the Hub: checked, verified and scanned before the first byte leaves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmcompress.errors import CompressError, ExitCode, without_tokens
from llmcompress.evaluation.gate import gate_failure
from llmcompress.exporters.base import EXPORTERS
from llmcompress.exporting import export_folders
from llmcompress.progress import ProgressLike, as_progress
from llmcompress.publishing.base_model import base_model
from llmcompress.publishing.benchmarks import benchmark_files
from llmcompress.publishing.card import card_text
from llmcompress.publishing.card_merge import merged_card
from llmcompress.publishing.card_metadata import CardFacts, metadata
from llmcompress.publishing.commits import Head, Pushed, commit_files, head_of, tag_commit, text_at
from llmcompress.publishing.destinations import MODEL, HubRepository
from llmcompress.publishing.hub import asked, hub_api, hub_errors
from llmcompress.publishing.outgoing import Artifact, OutgoingFile, artifact_in, outgoing_files, own_card
from llmcompress.publishing.redaction import places_in, public_names, renamed
from llmcompress.publishing.rights import check_rights
from llmcompress.publishing.secrets import secrets_in
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.records.evaluation import Comparison, Evaluation
from llmcompress.records.export_report import EXPORT_REPORT
from llmcompress.records.report import RECIPE, REPORT, Report, read_report
from llmcompress.records.tasks import TaskResult
from llmcompress.report.folder import read_measured
from llmcompress.report.forms import size
from llmcompress.report.saved import evaluation_of_result
from llmcompress.storage.json_file import read_json
from llmcompress.storage.names import CARD, FILES
from llmcompress.storage.paths import from_home
from llmcompress.verification.verifying import failure_of, verified

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class NotPublished(CompressError):
    """A run is finished and its folders are complete: only the push failed."""

    def __init__(self, cause: CompressError, output: Path, missing: Sequence[tuple[list[Path], HubRepository]]) -> None:
        saved = f"the finished model in {output}: only the push has to be repeated"
        super().__init__(
            cause.code, cause.what, where=cause.where, fix=cause.fix, saved=saved, exit_code=cause.exit_code
        )
        self.missing = tuple(missing)
        """Folders, and where they were to go."""


@dataclass(frozen=True)
class Outgoing:
    """What would be sent."""

    files: tuple[OutgoingFile, ...]
    left_out: tuple[str, ...]
    """Files of the folders that stay here, because llmcompress did not write them."""

    @property
    def card(self) -> str:
        """The model card."""
        content = self.files[-1].content
        assert isinstance(content, bytes)
        return content.decode()


def push(
    folders: Sequence[str | Path],
    wanted: HubRepository,
    *,
    report: str | Path | None = None,
    progress: ProgressLike = None,
) -> Pushed:
    """Publish the first folder, and others of the same model beside it, as one commit.

    In this order: rights, quality gate, digests and contents of every folder, model card, scan for secrets; then the
    upload. `report`: what `evaluate` wrote, for the card. A push that broke off goes on where it was.

    Raises: CompressError: (5) the Hub or the network; (6) a folder is not what was written, or its gate is not kept;
    (3) something secret would leave; (2) wrong settings.
    """
    shown, api = as_progress(progress), hub_api()
    saved = f"everything in {', '.join(map(str, folders))}; nothing was published"
    shown.stage("publish", 4)
    found = check_rights(api, wanted)
    shown.step("rights")
    artifacts = checked_artifacts(folders)
    shown.step("verified")
    with hub_errors(wanted.repository, saved=saved):
        if not found.exists:
            private = wanted.private is not False
            asked(lambda: api.create_repo(wanted.repository, private=private, exist_ok=True))
        head = head_of(api, wanted)
        there = text_at(api, wanted, head, CARD)
        outgoing = outgoing_of(artifacts, wanted, api=api, published_card=there, report=report)
        shown.step("scanned")
        shown.substep(f"sending what is new of {size(sum(each.size for each in outgoing.files))}")
        made = commit_files(api, wanted, head, outgoing.files)
        if wanted.tag is not None and made.commit is not None:
            tag_commit(api, wanted, made.commit)
    shown.step("published")
    return made


def publish_run(output: Path, recipe: Recipe, report: Report) -> tuple[Pushed, ...]:
    """Everything that a recipe publishes of its finished folders; nothing where its quality gate was not kept.

    Raises: NotPublished with what is still to be pushed.
    """
    if gate_failure(report, saved=str(output)) is not None:
        return ()
    exports = {EXPORTERS.name_of(type(each)): folder for each, folder in export_folders(output, recipe.export).items()}
    made = {MODEL: output, **exports}
    wanted = [
        ([folder for name, folder in made.items() if each.artifacts is None or name in each.artifacts], each)
        for each in recipe.publish
    ]
    done: list[Pushed] = []
    for number, (folders, repository) in enumerate(wanted):
        try:
            done.append(push(folders, repository))
        except CompressError as problem:
            raise NotPublished(problem, output, wanted[number:]) from problem
    return tuple(done)


def preview(folders: Sequence[str | Path], wanted: HubRepository, *, report: str | Path | None = None) -> Outgoing:
    """What `push` would send, with the same checks of the folders; the Hub is only read.

    Raises: CompressError as `push` does.
    """
    api = hub_api()
    found = check_rights(api, wanted)
    artifacts = checked_artifacts(folders)
    with hub_errors(wanted.repository, saved="nothing was sent"):
        head = head_of(api, wanted) if found.exists and wanted.revision is None else Head(None, {})
        return outgoing_of(artifacts, wanted, api=api, published_card=text_at(api, wanted, head, CARD), report=report)


def checked_artifacts(folders: Sequence[str | Path]) -> list[Artifact]:
    """The folders, each within its quality gate and as it was written.

    Raises: CompressError (exit code 6) otherwise.
    """
    artifacts = [artifact_in(from_home(str(folder))) for folder in folders]
    for folder in (each.folder for each in artifacts):
        refuse_failed_gate(folder)
        failure = failure_of(verified(folder, name=str(folder)), saved=f"{folder}, not published")
        if failure is not None:
            raise failure
    return artifacts


def refuse_failed_gate(folder: Path) -> None:
    """What is worse than its recipe allows stays where it is.

    Raises: CompressError (exit code 6) naming the limits.
    """
    if (folder / REPORT).is_file():
        failure = gate_failure(read_report(folder), saved=f"{folder}, not published")
        if failure is not None:
            raise failure


def outgoing_of(
    artifacts: Sequence[Artifact],
    wanted: HubRepository,
    *,
    api: HfApi,
    published_card: Path | None,
    report: str | Path | None,
) -> Outgoing:
    """Every file as it will be published, with its card.

    Raises: CompressError naming each file in which something secret stands.
    """
    first = artifacts[0].folder
    run = read_report(first) if (first / REPORT).is_file() else None
    base = base_model(run, stated=wanted.base_model, api=api)
    rewritten, names = _rewritten(artifacts, run, {run.model: base.name} if run else {})
    recipe = rewritten.get(first / RECIPE, b"").decode()
    facts = CardFacts(
        repository=wanted.repository,
        base=base,
        evaluation=_evaluation(first, run, None if report is None else from_home(str(report)), names),
        recipe=yaml.safe_load(recipe) or {},
        recipe_text=recipe,
        artifacts=artifacts,
        formats=[each.target or _format(each.folder) for each in artifacts],
        exports=[each.export_report for each in artifacts],
        needs_chat=any(name.startswith("chat_template") for name in artifacts[0].files),
    )
    own = own_card(first) or (published_card.read_text(encoding="utf-8") if published_card else None)
    card = merged_card(own, metadata(facts), without_tokens(renamed(card_text(facts), names)))
    scores = benchmark_files(facts.evaluation.of_kind(TaskResult), repository=wanted.repository, api=api)
    files = outgoing_files(artifacts, card=card, rewritten=rewritten, more=scores)
    secrets = [str(each) for file in files for each in secrets_in(file)]
    if secrets:
        what = f"{len(secrets)} places in the files look like secrets or name a folder on this computer"
        fix = (
            "remove them from the files (and revoke a token that was written to a file), then compress or export again"
        )
        raise CompressError("publish.secret", what, where="; ".join(secrets[:10]), fix=fix, saved="nothing was sent")
    sent = {each.folder / name for each in artifacts for name in each.files}
    others = (path for each in artifacts for path in sorted(each.folder.rglob("*")) if path.is_file())
    left = tuple(path.name for path in others if path not in sent and path.name not in (CARD, FILES))
    return Outgoing(files, left)


def _rewritten(
    artifacts: Sequence[Artifact], run: Report | None, known: dict[str, str]
) -> tuple[dict[Path, bytes], dict[str, str]]:
    """Recipes and reports without the places on this computer; and what replaced those.

    A recipe that is published publishes nothing itself. Where a place was replaced it has another hash than the one
    that ran, and its report says so.
    """
    texts = {
        each.folder / name: (each.folder / name).read_text(encoding="utf-8")
        for each in artifacts
        for name in (RECIPE, REPORT, EXPORT_REPORT)
        if name in each.files
    }
    for path in [path for path in texts if path.name == RECIPE]:
        texts[path] = parse_recipe(texts[path], str(path)).model_copy(update={"publish": ()}).to_yaml()
    recipes = [yaml.safe_load(text) for path, text in texts.items() if path.name == RECIPE]
    models = [read_json(path).get("model") for path in texts if path.name != RECIPE]
    names = public_names(places_in([*recipes, *models]), known=known)
    found = {path: renamed(text, names) for path, text in texts.items()}
    if run is not None:
        hashes = {parse_recipe(text, RECIPE).hash() for path, text in found.items() if path.name == RECIPE}
        for published in hashes if len(hashes) == 1 else ():
            found = {path: text.replace(run.recipe_hash, published) for path, text in found.items()}
    return {path: text.encode() for path, text in found.items()}, names


def _evaluation(folder: Path, run: Report | None, more: Path | None, names: dict[str, str]) -> Evaluation:
    """What was measured of the model: by the run, and by an evaluation of it."""
    found = evaluation_of_result(folder) if run is not None else _nothing(folder)
    if more is None:
        return found
    told = read_measured(more)
    if isinstance(told, Comparison):
        if len(told.evaluations) != 1:
            what = f"the report compares {len(told.evaluations)} models, and the card is of one"
            raise CompressError("publish.report", what, where=str(more), fix="give the report of one model",
                                exit_code=ExitCode.USAGE)  # fmt: skip
        told = told.evaluations[0]
    kinds = {type(each) for each in told.measurements}
    kept = [each for each in found.measurements if type(each) not in kinds]
    command = None if told.command is None else shlex.join(_public(word, names) for word in shlex.split(told.command))
    return found.model_copy(
        update={
            "measurements": (*kept, *told.measurements),
            "machine": told.machine,
            "versions": {**told.versions, **found.versions},
            "warnings": tuple(dict.fromkeys([*found.warnings, *told.warnings])),
            "command": command,
        }
    )


def _nothing(folder: Path) -> Evaluation:
    return Evaluation(model=folder.absolute().name, runner="torch", versions={}, machine={})


def _public(word: str, names: dict[str, str]) -> str:
    return renamed(word, {**public_names(places_in(word), known=names), **names})


def _format(folder: Path) -> str:
    """Of a Hugging Face folder."""
    found: Any = read_json(folder / "config.json").get("quantization_config")
    return str(found.get("quant_method", "plain")) if isinstance(found, dict) else "plain"
