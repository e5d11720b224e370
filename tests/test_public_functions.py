"""What a reader may rely on of every public function: types, shapes of arrays, the errors that it raises."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef

MOST_LINES = 60
"""Of a function's body without its docstring."""


def functions() -> Iterator[tuple[str, Function]]:
    """Functions of modules and methods of classes whose names are public; functions inside functions are not."""
    for folder in ("jaxrank", "convert", "server"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT)
            if place.parts[:2] not in (("jaxrank", "convert"), ("jaxrank", "server")):  # links
                yield from public(ast.parse(path.read_text()), str(place))


def public(node: ast.Module | ast.ClassDef, place: str) -> Iterator[tuple[str, Function]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child, f"{place}:{child.name}")
        elif isinstance(child, Function) and (child.name == "__init__" or not child.name.startswith("_")):
            yield f"{place}:{child.name}", child


def parameters(function: Function) -> list[ast.arg]:
    spec = function.args
    found = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
    return [one for one in found if one.arg not in ("self", "cls")]


def test_every_parameter_and_result_has_a_type() -> None:
    found = list(functions())
    assert len(found) > 500
    for name, function in found:
        missing = [one.arg for one in parameters(function) if one.annotation is None]
        assert not missing, f"{name}: {missing}"
        assert function.name == "__init__" or function.returns is not None, f"{name} has no type of its result"


def raised(node: ast.AST) -> Iterator[ast.Raise]:
    """The raise statements of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child
        if not isinstance(child, Function):
            yield from raised(child)


def test_raised_errors_are_documented() -> None:
    for name, function in functions():
        if function.name != "__init__" and any(raised(function)):
            assert "aise" in (ast.get_docstring(function) or ""), f"{name} raises, and its docstring does not say what"


def test_length() -> None:
    for name, function in functions():
        documented = ast.get_docstring(function) is not None
        begin = function.body[0].end_lineno if documented else function.body[0].lineno - 1
        assert (lines := (function.end_lineno or 0) - (begin or 0)) <= MOST_LINES, f"{name} has {lines} lines"
