"""Laws of the code itself: imports flow one way, nothing prints, importing is instant, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmcompress"
MAX_LINES = 350


def stages() -> list[str]:
    """The order of import, left to right, as docs/architecture.md gives it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    flow = next(line for line in text.splitlines() if line.startswith("    errors, "))
    return [name.strip() for name in re.split("[,→]", flow)]


def stage_of(path: Path) -> str:
    """The first name below llmcompress: `numerics/grid.py` → numerics, `run.py` → run."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(source: str) -> Iterator[tuple[int, str]]:
    """Line and stage of every import of ours in a module, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "llmcompress":
                yield node.lineno, rest[0] if rest else "__init__"


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def against_the_flow(source: str, stage: str, order: list[str]) -> list[str]:
    """Imports of something that does not stand to the left, nor in the same stage."""
    allowed = order[: order.index(stage) + 1]
    return [f"line {line} imports {name}" for line, name in imported_stages(source) if name not in allowed]


def test_every_module_has_a_place_in_the_flow():
    order = stages()
    found = {stage_of(path) for path in modules()} - {"__init__", "__main__"}
    assert found == set(order)


def test_imports_flow_one_way():
    order = stages()
    wrong = {
        str(path.relative_to(ROOT)): problems
        for path in modules()
        if stage_of(path) not in ("__init__", "__main__", "cli")
        and (problems := against_the_flow(path.read_text(encoding="utf-8"), stage_of(path), order))
    }
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import llmcompress.cli.main",
        "from llmcompress.passes.base import PASSES",
        "def late():\n    from llmcompress import pipeline",
        "from llmcompress import compress",
    ],
)
def test_an_import_against_the_flow_is_noticed(source):
    assert against_the_flow(source, "numerics", stages())


FAMILIES = ("quantization", "pruning", "decomposition", "dynamic")
"""Of passes: what two of them need lies below them."""


def imported_modules(source: str) -> set[str]:
    """Full names of all modules of ours that a module may import, those for type checkers only included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("llmcompress.")}


def graph() -> dict[str, set[str]]:
    """Module → modules that it imports."""
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
            encoding="utf-8"
        )
        for path in modules()
    }
    return {name: imported_modules(source) & sources.keys() for name, source in sources.items()}


def family_of(module: str) -> str | None:
    """The family that a module of passes belongs to."""
    _, stage, *rest = [*module.split("."), ""]
    return rest[0] if stage == "passes" and rest[0] in FAMILIES else None


def test_no_family_of_passes_reaches_into_another() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if family_of(module) and family_of(other) and family_of(module) != family_of(other)
    ]
    assert not wrong


def test_no_files_import_each_other_even_by_a_detour() -> None:
    from graphlib import CycleError, TopologicalSorter

    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as found:
        pytest.fail(" → ".join(found.args[1]))


def test_an_import_for_type_checkers_counts() -> None:
    source = "if TYPE_CHECKING:\n    from llmcompress.passes.pruning.sparse import SparsePass"
    assert "llmcompress.passes.pruning.sparse" in imported_modules(source)


def test_nothing_prints_outside_the_command_line():
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if stage_of(path) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls


def test_no_module_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert not [path for path in modules() if vague & set(path.with_suffix("").parts[len(PACKAGE.parts) :])]


def test_files_stay_short():
    folders = [PACKAGE, ROOT / "scripts", ROOT / "evals"]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES}


def test_every_module_says_what_it_is_for():
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if (text := path.read_text(encoding="utf-8")) and not ast.get_docstring(ast.parse(text))
    ]
    assert not silent


def test_importing_the_package_does_not_import_torch():
    program = "import sys, llmcompress; sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_public_names_are_there():
    import llmcompress

    assert all(getattr(llmcompress, name) is not None for name in llmcompress.__all__)
