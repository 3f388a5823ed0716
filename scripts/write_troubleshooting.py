"""Writes docs/troubleshooting.md: every error a user can cause, read from the places where the library raises it.

    python scripts/write_troubleshooting.py            rewrite the page
    python scripts/write_troubleshooting.py --check    exit with 1 when it is out of date

An error is a call of `CompressError`, or of a function that passes its own arguments on to one. Values that are only
known when it happens are shown as ‹names›. Standard library only.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
ERROR = "CompressError"
POSITIONS = ("code", "what")
SHOWN = ("code", "what", "fix", "exit_code")
DEEPEST = 3
"""Functions between the place that knows what is wrong and the error."""
ABOUT = """# Troubleshooting

Every error names its code in brackets. Find the code here, or by its text. `scripts/write_troubleshooting.py`
reads this page from the source of the library; ‹…› stands for what is only known when it happens, and
“or” for the alternatives of one place. Exit codes are explained in [command-line.md](command-line.md).

An error that is not here, or exit code 1, is a bug in llmcompress: please report it with the file that the message
names. `llmcompress doctor` shows what is installed, and what is missing.
"""


@dataclass(frozen=True)
class Function:
    """A function of the library."""

    parameters: tuple[str, ...]
    defaults: Mapping[str, ast.expr]
    body: ast.AST


@dataclass(frozen=True, order=True)
class Found:
    """One error, as text."""

    code: str
    what: str
    fix: str
    exit_code: str


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check the page."""
    wanted = page(sorted(set(errors(ROOT / "llmcompress"))))
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    if "--check" in arguments:
        print(f"{PAGE.name} is out of date: run `python scripts/{Path(__file__).name}`", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def errors(package: Path) -> Iterator[Found]:
    """Of all modules."""
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere = list(_functions(tree))
        functions = dict(everywhere)
        for name, function in [("", Function((), {}, _outside_functions(tree))), *everywhere]:
            if not _forwards(name, function, functions):
                yield from _raised(function, functions, {}, 0)


def _functions(tree: ast.AST) -> Iterator[tuple[str, Function]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            named = [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg not in ("self", "cls")]
            late = [each.arg for each in arguments.kwonlyargs]
            defaults = dict(zip(reversed(named), reversed(arguments.defaults), strict=False))
            defaults |= {
                key: value for key, value in zip(late, arguments.kw_defaults, strict=True) if value is not None
            }
            yield node.name, Function((*named, *late), defaults, node)


def _outside_functions(tree: ast.Module) -> ast.Module:
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(kept, [])


def _forwards(name: str, function: Function, functions: Mapping[str, Function]) -> bool:
    """Whether its errors take their code or text from its callers in the same module."""
    if not any(
        name == _called(call) for other in functions.values() if other is not function for call in _calls(other)
    ):
        return False
    texts = [
        value
        for call in _calls(function)
        if _called(call) == ERROR
        for key, value in _arguments(call, POSITIONS).items()
        if key in ("code", "what", "fix")
    ]
    return any(
        isinstance(node, ast.Name) and node.id in function.parameters for text in texts for node in ast.walk(text)
    )


def _calls(function: Function) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function.body) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    return (
        call.func.id
        if isinstance(call.func, ast.Name)
        else call.func.attr
        if isinstance(call.func, ast.Attribute)
        else ""
    )


def _arguments(call: ast.Call, positions: Sequence[str]) -> dict[str, ast.expr]:
    given = {
        name: value for name, value in zip(positions, call.args, strict=False) if not isinstance(value, ast.Starred)
    }
    return given | {each.arg: each.value for each in call.keywords if each.arg}


def _raised(
    function: Function, functions: Mapping[str, Function], known: Mapping[str, str], depth: int
) -> Iterator[Found]:
    """The errors of a function whose arguments are known as texts."""
    for call in _calls(function):
        name, local = _called(call), {**_assigned(function, known, call.lineno), **known}
        if name == ERROR:
            given = _arguments(call, POSITIONS)
            texts = {key: _text(given[key], local) if key in given else "" for key in SHOWN}
            for code in texts["code"].split(" or "):
                yield Found(code, texts["what"], texts["fix"], texts["exit_code"] or "REFUSED")
        elif name in functions and depth < DEEPEST and _forwards(name, functions[name], functions):
            inner = functions[name]
            defaults = {key: _text(value, {}) for key, value in inner.defaults.items()}
            given = {key: _text(value, local) for key, value in _arguments(call, inner.parameters).items()}
            yield from _raised(inner, functions, defaults | given, depth + 1)


def _assigned(function: Function, known: Mapping[str, str], before: int) -> dict[str, str]:
    """Texts of its variables as they were last assigned above a line."""
    found: dict[str, tuple[int, str]] = {}
    for node in ast.walk(function.body):
        if isinstance(node, ast.Assign) and node.lineno < before:
            for target in node.targets:
                for name, value in _pairs(target, node.value):
                    if _is_text(value) and node.lineno >= found.get(name, (0, ""))[0]:
                        found[name] = node.lineno, _text(value, known)
    return {name: text for name, (_, text) in found.items()}


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, other)


def _text(node: ast.expr, known: Mapping[str, str]) -> str:
    """An expression as a reader sees it."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(_text(each, known) for each in node.values)
        case ast.FormattedValue():
            return _text(node.value, known)
        case ast.BinOp(op=ast.Add()) if _is_text(node.left) or _is_text(node.right):
            return _text(node.left, known) + _text(node.right, known)
        case ast.BinOp():
            return _text(node.left, known)
        case ast.IfExp():
            return f"{_text(node.body, known)} or {_text(node.orelse, known)}"
        case ast.Attribute() if _dotted(node).startswith("ExitCode."):
            return node.attr
        case ast.Name() if node.id in known:
            return known[node.id]
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return f"‹{_dotted(node).strip('_').lower().replace('_', ' ')}›"
        case ast.Call(func=ast.Name(id="did_you_mean")):
            return "‹the nearest name›"
        case ast.Call() if node.args and _called(node) not in ("len", "join"):
            return _text(node.args[0], {})
        case ast.Call() if _called(node) == "join" and node.args:
            return "‹…›"
    return "‹…›"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.IfExp | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _dotted(node: ast.AST) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            inner = _dotted(node.value)
            return f"{inner}.{node.attr}" if inner == "ExitCode" else node.attr
        case ast.Subscript():
            return _dotted(node.value)
    return "…"


def page(found: Sequence[Found]) -> str:
    """The page: a table for each area, which is the first word of a code."""
    areas: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        areas[each.code.partition(".")[0]].append(each)
    parts = [ABOUT]
    for area, rows in sorted(areas.items()):
        parts.append(f"## {area}\n\n| Error | What happened | What to do | Exit code |\n|---|---|---|---|")
        parts[-1] += "".join(
            f"\n| `{row.code}` | {_cell(row.what)} | {_cell(row.fix)} | {row.exit_code.lower()} |" for row in rows
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
