"""What a Python file of the user's says of its functions, read without running it.

Client-side: no torch here.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from openweights.errors import ConfigError, closest

# What a reward function is given beside the dataset's columns.
ARGUMENTS = ("completions", "prompts", "completion_ids", "gold_response")
_SHOWN = 12  # names in a message


def check_source(path: Path, function: str, field: str) -> None:
    """See that a Python file has the function that a field names, without running it.

    Raises:
        ConfigError: It cannot be read, is no Python, or binds no such name.
    """
    place = f"{field}: {path}"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; correct the path") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{place}: is no Python ({error}); correct it") from None
    if function not in set(_bound_names(tree)):
        raise ConfigError(f"{place}: has no function {function!r}; define it, or correct its name")


def source_problems(functions: Iterable[tuple[str, str]], field: str) -> list[str]:
    """What `check_source` says of each (file, function), a line each."""
    lines: list[str] = []
    for file, function in functions:
        try:
            check_source(Path(file).expanduser(), function, field)
        except ConfigError as error:
            lines.append(str(error))
    return lines


def check_arguments(source: bytes, function: str, columns: Collection[str], field: str) -> None:
    """See that a reward function asks for nothing that it is not given.

    Only a plain `def` of the file says what it takes; what is imported, assigned or decorated is
    left to the job.

    Args:
        columns: Of the dataset's rows.

    Raises:
        ConfigError: It takes nothing, or wants an argument that there is not.
    """
    node = _definition(source, function)
    if node is None or node.decorator_list:
        return
    known = list(dict.fromkeys([*ARGUMENTS, *sorted(set(columns) - {"messages"})]))
    place, names = f"{field}: {function}({ast.unparse(node.args)})", _listed(known)
    takes = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if not takes and node.args.kwarg is None:
        raise ConfigError(f"{place} takes nothing to score; it is given {names}")
    if node.args.posonlyargs:
        raise ConfigError(f"{place} is called by the names of its arguments; remove the '/'")
    for name in _required(node.args):
        if name not in known:
            near = closest(name, known)
            meant = f"did you mean {near!r}? It is given" if near else "it is given"
            raise ConfigError(f"{place} wants {name!r}, which is not there; {meant} {names}")


def public_functions(path: Path) -> list[str]:
    """The functions of a file, as far as it can be read, without those that begin with `_`."""
    try:
        tree = ast.parse(path.expanduser().read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in _functions(tree) if not node.name.startswith("_")]


def _definition(source: bytes, function: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The one `def` of that name, if nothing else binds the name."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    found = [node for node in _functions(tree) if node.name == function]
    is_only = list(_bound_names(tree)).count(function) == 1
    return found[0] if found and is_only else None


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _required(arguments: ast.arguments) -> list[str]:
    """Names of the arguments without a default."""
    plain = arguments.args[: len(arguments.args) - len(arguments.defaults)]
    keyed = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return [arg.arg for arg in [*plain, *(arg for arg, default in keyed if default is None)]]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Names that the module itself binds, as often as it does; not those inside of functions."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        left += ast.iter_child_nodes(node)
