"""What the house measures, read from the source: `python tests/house.py`.

Code lines are those with a token of code on them: no blank line, no comment, no docstring. A function's length is that of its body,
the functions within it included, its signature and decorators not.
"""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
TOPS = ("nexus_scale", "data_pipelines", "launch")

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


class Function(NamedTuple):
    """`where`: path:line; `name`: of the function, with its class before it; `lines`: of code in its body."""

    where: str
    name: str
    lines: int

    @property
    def is_constructor(self) -> bool:
        return self.name.endswith("__init__")


def sources() -> dict[str, str]:
    """The program's files by their path in the repository."""
    files = (file for top in TOPS for file in sorted((REPO / top).rglob("*.py")))
    return {file.relative_to(REPO).as_posix(): file.read_text(encoding="utf-8") for file in files}


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that have code on them."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def functions(path: str, source: str) -> Iterator[Function]:
    """All functions and methods of a file."""
    tree = ast.parse(source)
    lines = code_lines(source, tree)

    def within(node: ast.AST, before: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = before
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{before}.{child.name}" if before else child.name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                body = range(child.body[0].lineno, (child.end_lineno or 0) + 1)
                yield Function(f"{path}:{child.lineno}", name, len(lines.intersection(body)))
            yield from within(child, name)

    yield from within(tree, "")


def imported(path: str, source: str, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports, inside functions too; a package where it is the package that is asked for a name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {
                full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            }
    return found & modules


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(files: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import one another in a circle, lazy imports counted; strongly connected components (Tarjan 1972)."""
    modules = {module_of(path) for path in files}
    graph = {module_of(path): imported(path, source, modules) - {module_of(path)} for path, source in files.items()}
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def top_level() -> list[str]:
    """Modules that lie in the package itself and not in a room."""
    return sorted(file.stem for file in (REPO / "nexus_scale").glob("*.py") if file.name != "__init__.py")


def main() -> None:
    files = sources()
    found = [function for path, source in files.items() for function in functions(path, source)]
    loop = next(f for f in found if f.where.startswith("nexus_scale/trainer.py") and f.name == "Trainer._step")
    long = sorted((f for f in found if not f.is_constructor), key=lambda f: -f.lines)
    round_and_round = circles(files)
    print(f"inner loop (Trainer._step): {loop.lines} lines of code")
    print(f"functions: {len(found)}; median {statistics.median(f.lines for f in found):g} lines of code")
    print("longest outside constructors: " + "; ".join(f"{f.lines} {f.name} ({f.where})" for f in long[:10]))
    print(f"circles: {len(round_and_round)}" + "".join(f"\n  {' <-> '.join(group)}" for group in round_and_round))
    print(f"modules at the top: {len(top_level())} ({', '.join(top_level())})")
    print(
        f"code: {sum(len(code_lines(source, ast.parse(source))) for source in files.values()):,} lines in {len(files)} files"
    )


if __name__ == "__main__":
    main()
