"""Print figures about the structure of the code: sizes, branches, imports, import circles.

    python benchmarks/code_figures.py [ROOT]

Reads every Python file below ROOT/raypipe (default: this checkout) with `ast` and imports none of
them. The figures are for comparing two versions of the code. They are not a gate.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "raypipe"
LAYOUT = ("rundir.py", "runs/layout.py")
"""Files, relative to the package, that know which folders and files a run has."""
SHOWN = 10
"""How many functions each ranking shows."""
COLUMNS = 100
LONG_FILE = 400
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.match_case,
)
"""Syntax nodes that are one branch each."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One parsed source file.

    Attributes
    ----------
    name
        Dotted name; a package has the name of its folder.
    file
        Path relative to the package folder, with forward slashes.
    is_package
        Whether the file is an `__init__.py`.
    lines
        Source lines without line ends.
    tree
        The parsed source.
    """

    name: str
    file: str
    is_package: bool
    lines: tuple[str, ...]
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """One module that an import statement names, and when the statement is executed.

    Attributes
    ----------
    module
        Dotted name of the module.
    name
        The name taken from it; empty for `import module`.
    line
        Line of the statement.
    when
        `import`: at module level; `lazy`: in a function; `types`: under `TYPE_CHECKING`.
    """

    module: str
    name: str
    line: int
    when: str


@dataclass(frozen=True)
class Measured:
    """A function with its length in lines and its number of branches."""

    name: str
    place: str
    lines: int
    branches: int


def read_modules(root: Path) -> list[Module]:
    """Return every module of `root/raypipe`, sorted by file.

    Raises
    ------
    FileNotFoundError
        If `root` has no such folder.
    """
    folder = root / PACKAGE
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the root of a checkout")
    modules = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        text = path.read_text(encoding="utf-8")
        modules.append(
            Module(
                name=".".join(parts[:-1] if is_package else parts),
                file=path.relative_to(folder).as_posix(),
                is_package=is_package,
                lines=tuple(text.splitlines()),
                tree=ast.parse(text, str(path)),
            )
        )
    return modules


# -- functions ------------------------------------------------------------------------------------


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Yield every function with its qualified name, methods and nested functions included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield prefix + child.name, child
            if isinstance(child, Function | ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(module.tree, "")


def branches(function: Function) -> int:
    """Return the number of branches in a function, without those of functions nested in it.

    Counts `if` (also as an expression), `for`, `while`, `except`, every operand of `and` and `or`
    after the first, every `if` of a comprehension, and every `case`.
    """
    count = 0
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function):
            continue
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
        waiting.extend(ast.iter_child_nodes(node))
    return count


def measure_functions(modules: Iterable[Module]) -> list[Measured]:
    """Return every function with its length and branches."""
    return [
        Measured(
            name=name,
            place=f"{module.file}:{function.lineno}",
            lines=(function.end_lineno or function.lineno) - function.lineno + 1,
            branches=branches(function),
        )
        for module in modules
        for name, function in functions(module)
    ]


# -- patterns -------------------------------------------------------------------------------------


def nodes(modules: Iterable[Module], matches: Callable[[ast.AST], bool]) -> list[str]:
    """Return `file:line` of every syntax node that matches."""
    return [
        f"{module.file}:{getattr(node, 'lineno', 0)}"
        for module in modules
        for node in ast.walk(module.tree)
        if matches(node)
    ]


def is_path_literal(node: ast.AST) -> bool:
    """Whether a node is a call `x.path("literal", ...)`; an f-string is a literal, too."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    first = node.args[0] if node.args else None
    literal = isinstance(first, ast.JoinedStr)
    literal |= isinstance(first, ast.Constant) and isinstance(first.value, str)
    return node.func.attr == "path" and literal


def returns_any(node: ast.AST) -> bool:
    """Whether a node is a function annotated with `-> Any`."""
    return isinstance(node, Function) and node.returns is not None and is_any(node.returns)


def is_any(annotation: ast.expr) -> bool:
    """Whether an annotation is `Any`, also with its module or in quotes."""
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    return text in ("Any", "typing.Any")


def is_bare_cluster(node: ast.AST) -> bool:
    """Whether a node is a statement that consists of `context.cluster` alone."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Attribute):
        return False
    return f".{ast.unparse(node.value)}".endswith(".context.cluster")


def lines_where(modules: Iterable[Module], matches: Callable[[str], bool]) -> list[str]:
    """Return `file:line` of every source line that matches."""
    return [
        f"{module.file}:{number}"
        for module in modules
        for number, line in enumerate(module.lines, 1)
        if matches(line)
    ]


# -- imports --------------------------------------------------------------------------------------


def imports(module: Module) -> Iterator[Import]:
    """Yield every imported name of a module, wherever the statement stands."""

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, "", child.lineno, when) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = origin(module, child)
                names = (alias.name for alias in child.names)
                yield from (Import(source, name, child.lineno, when) for name in names)
            elif isinstance(child, ast.If) and is_type_checking(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), "types")
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), when)
            elif isinstance(child, Function) and when == "import":
                yield from walk(child, "lazy")
            else:
                yield from walk(child, when)

    return walk(module.tree, "import")


def origin(module: Module, statement: ast.ImportFrom) -> str:
    """Return the absolute name of the module after `from`."""
    if not statement.level:
        return statement.module or ""
    base = module.name.split(".")
    up = statement.level - module.is_package
    base = base[: len(base) - up] if up else base
    return ".".join([*base, *([statement.module] if statement.module else [])])


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_graph(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, at any time.

    `from package import name` leads to the submodule `name` where there is one, and otherwise to
    the package. That an import of a submodule executes the `__init__.py` of its package does not
    count. Modules that are imported by a string (`import_module`) do not count either.
    """
    known = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        targets = set()
        for item in imports(module):
            submodule = f"{item.module}.{item.name}"
            targets.add(submodule if submodule in known else item.module)
        graph[module.name] = (targets & known) - {module.name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of two or more modules, the largest first.

    References
    ----------
    R. Tarjan, "Depth-first search and linear graph algorithms", SIAM Journal on Computing 1(2),
    1972.
    """
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in number:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], number[target])
        if low[name] == number[name]:
            at = stack.index(name)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return sorted(found, key=lambda component: (-len(component), component))


def importers(modules: Iterable[Module], package: str) -> dict[str, list[str]]:
    """Return the files that import a package by the earliest time they do.

    Returns
    -------
    dict
        `import` (at module level), `lazy` (in functions) and `types` (only under
        `TYPE_CHECKING`), each a list of files.
    """
    result: dict[str, list[str]] = {"import": [], "lazy": [], "types": []}
    for module in modules:
        times = {
            item.when
            for item in imports(module)
            if item.module == package or item.module.startswith(f"{package}.")
        }
        for when, files in result.items():
            if when in times:
                files.append(module.file)
                break
    return result


def private_imports(modules: Iterable[Module]) -> list[str]:
    """Return `file:line name` of every private name imported from a module of the package."""
    return [
        f"{module.file}:{item.line} {item.module}.{item.name}"
        for module in modules
        for item in imports(module)
        if item.module.split(".")[0] == PACKAGE
        and item.name.startswith("_")
        and not item.name.startswith("__")
    ]


# -- output ---------------------------------------------------------------------------------------


def ranked(title: str, items: Sequence[Measured], figure: Callable[[Measured], int]) -> list[str]:
    """Return the lines of a ranking of functions, the highest figure first."""
    top = sorted(items, key=lambda item: (-figure(item), item.place))[:SHOWN]
    return ["", title, *(f"  {figure(item):>5}  {item.name:<44}  {item.place}" for item in top)]


def listed(title: str, items: Sequence[str]) -> list[str]:
    """Return a heading with a count and the items below it."""
    return ["", f"{title:<56}{len(items):>7,}", *(f"  {item}" for item in items)]


def by_file(places: Iterable[str]) -> list[str]:
    """Return how many of some places `file:line` each file has, the highest count first."""
    counts: dict[str, int] = {}
    for place in places:
        file = place.partition(":")[0]
        counts[file] = counts.get(file, 0) + 1
    return [f"{count:>5}  {file}" for file, count in sorted(counts.items(), key=_most_first)]


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def describe(root: Path) -> Iterator[str]:
    """Yield the lines of the report about `root/raypipe`."""
    modules = read_modules(root)
    direct = [m.file for m in modules if "/" not in m.file]
    packages = [m.file for m in modules if m.is_package and m.file.count("/") == 1]
    below = [m.file for m in modules if m.is_package and m.file.count("/") > 1]
    paths = nodes([m for m in modules if m.file not in LAYOUT], is_path_literal)
    figures = {
        f"modules directly in {PACKAGE}/, with __init__.py": len(direct),
        f"packages directly in {PACKAGE}/": len(packages),
        "packages below those": len(below),
        "files": len(modules),
        "lines": sum(len(m.lines) for m in modules),
        "lines with dict[str, Any]": len(lines_where(modules, lambda t: "dict[str, Any]" in t)),
        '.path("literal") outside the layout module': len(paths),
        "functions annotated with -> Any": len(nodes(modules, returns_any)),
        "statements `context.cluster` alone": len(nodes(modules, is_bare_cluster)),
        f"lines over {COLUMNS} columns": len(lines_where(modules, lambda t: len(t) > COLUMNS)),
    }
    for what, count in figures.items():
        yield f"{what:<56}{count:>7,}"
    measured = measure_functions(modules)
    yield from ranked("longest functions: lines", measured, lambda item: item.lines)
    yield from ranked("functions with most branches", measured, lambda item: item.branches)
    long = sorted((m for m in modules if len(m.lines) > LONG_FILE), key=lambda m: -len(m.lines))
    title = f"files over {LONG_FILE} lines"
    yield from listed(title, [f"{len(m.lines):>5}  {m.file}" for m in long])
    by_time = importers(modules, "ray")
    yield from listed("modules that import ray at module level", by_time["import"])
    yield from listed("modules that import ray only in functions", by_time["lazy"])
    yield from listed("modules that import ray only for types", by_time["types"])
    found = circles(import_graph(modules))
    title = "import circles, lazy and typing imports included"
    yield from listed(title, [f"{len(names):>5}  {' '.join(names)}" for names in found])
    yield from listed("private names imported across modules", private_imports(modules))
    yield from ["", 'files with .path("literal") outside the layout module']
    yield from (f"  {line}" for line in by_file(paths))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    checkout = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=checkout, help="root of a checkout")
    try:
        for line in describe(parser.parse_args().root):
            print(line)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
