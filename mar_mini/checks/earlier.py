"""What a learner wrote in an earlier chapter, fetched from its notebook.

    attend = check_transformer.attend(own("05", "attend"))  # in the notebook of chapter 7

Of the other notebook only what the wanted definition needs is run: imports, other definitions, and
assignments that call nothing. So it takes no time, whatever that chapter trains.
"""

import ast
import contextlib
import io
import linecache
import re
import symtable
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mar_mini.checks import Failed

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def own(chapter: str, name: str, folder: Path | str = ".") -> Callable:
    """A function or class as it stands in the notebook of an earlier chapter, saved last.

    chapter  its number, `05`
    name     what the notebook defines, with `def` or `class`; of several definitions the last
    folder   where the notebook is; of the running notebook it is the working directory

    What it uses of its own chapter comes along, checked there as in the chapter itself. Never
    raises: what cannot be fetched is handed on as a stand-in that raises `Failed`, with the reason,
    when a check calls it.
    """
    try:
        path = _notebook(Path(folder), chapter)
        statements = list(_statements(path))
        namespace = {"__name__": "__main__"}
        for statement in _needed(statements, name, path.name):
            _run(statement, namespace)
        return namespace[name]
    except Exception as error:
        return _stand_in(error, f"chapter {chapter}: {name}")


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a cell that binds names."""

    index: int  # of all in the notebook
    file: str  # what a traceback calls its cell
    node: ast.stmt
    binds: frozenset[str]
    checkpoint: bool  # name = check.name(name)

    @property
    def uses(self) -> set[str]:
        """Names of the notebook that it reads: not its own local ones."""
        open_ends, names = [symtable.symtable(ast.unparse(self.node), self.file, "exec")], set()
        while open_ends:
            scope = open_ends.pop()
            open_ends += scope.get_children()
            outermost = scope.get_type() == "module"
            names.update(
                symbol.get_name()
                for symbol in scope.get_symbols()
                if symbol.is_referenced() and (outermost or symbol.is_global())
            )
        return names


def _notebook(folder: Path, chapter: str) -> Path:
    found = [p for p in sorted(folder.glob(f"{chapter}_*.ipynb")) if ".before-reset-" not in p.name]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise Failed(f"expected one notebook {chapter}_*.ipynb beside this one, found {names}")
    return found[0]


def _statements(path: Path) -> Iterator[Statement]:
    """The statements that could be needed, in order; cells that are not Python are left out."""
    import nbformat

    index = 0
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code":
            continue
        source = re.sub(r"(?m)^[%!].*$", "", cell.source)  # what is IPython's alone
        file = f"{path.name}, cell {number}"
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        for node in body:
            binds = frozenset(_bound(node))
            if binds:
                yield Statement(index, file, node, binds, _is_checkpoint(node))
                index += 1


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement binds, if it may be run at all."""
    if isinstance(node, DEFINITIONS):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign):
        calls = any(isinstance(inner, ast.Call) for inner in ast.walk(node))
        if not calls or _is_checkpoint(node):
            names = (n for target in node.targets for n in ast.walk(target))
            yield from (n.id for n in names if isinstance(n, ast.Name))


def _is_checkpoint(node: ast.stmt) -> bool:
    """name = check.name(name)"""
    match node:
        case ast.Assign(
            [ast.Name(target)], ast.Call(ast.Attribute(ast.Name(), _), [ast.Name(given)])
        ):
            return target == given
    return False


def _needed(statements: list[Statement], name: str, notebook: str) -> list[Statement]:
    """Of all statements those that the last definition of `name` needs, in order, and itself."""
    defined = [s for s in statements if isinstance(s.node, DEFINITIONS) and name in s.binds]
    if not defined:
        raise Failed(f"{notebook} has no `def {name}` or `class {name}`; save that notebook first")
    needed, open_ends = {defined[-1].index: defined[-1]}, [defined[-1]]
    while open_ends:
        for used in open_ends.pop().uses - {name}:
            bindings = [s for s in statements if used in s.binds]
            firm = [i for i, s in enumerate(bindings) if not s.checkpoint]
            for s in bindings[firm[-1] :] if firm else ():  # the last, and the checks behind it
                if s.index not in needed:
                    needed[s.index] = s
                    open_ends.append(s)
    return sorted(needed.values(), key=lambda s: s.index)


def _run(statement: Statement, namespace: dict) -> None:
    code = compile(ast.Module([statement.node], []), statement.file, "exec")
    with contextlib.redirect_stdout(io.StringIO()):  # a check says its line in its own chapter
        exec(code, namespace)


def _stand_in(error: Exception, what: str) -> type:
    """A class, since a check may ask for one, that cannot be made and says why."""
    known = isinstance(error, Failed)
    reason = str(error) if known else f"{what} cannot run, {type(error).__name__}: {error}"

    class Missing:
        def __init__(self, *args, **kwargs):
            raise Failed(reason) from error

    return Missing
