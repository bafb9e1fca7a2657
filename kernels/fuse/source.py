"""Rewriting the source of a forward: some expressions become calls of fused operators, all else stays as it is.

Only a function whose source still compiles to the very bytecode that runs is rewritten. The copy has the names, the
defaults, the closure and the line numbers of the original, and its own globals: those of the original, with the fused
operators beside them.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .sample import Refused

_FEATURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

#: What replaces a node: given the node, its fused form. By the node's number in a walk through the tree.
Edits = Mapping[int, Callable[[Any], ast.AST]]


@functools.lru_cache(maxsize=4096)
def numbered(tree: ast.AST) -> Mapping[int, int]:
    """The number of each node in a walk through the tree, by the node's id."""
    return {id(node): number for number, node in enumerate(ast.walk(tree))}


def blocks(tree: ast.AST) -> Iterator[list[Any]]:
    """Every list of statements that run one after the other."""
    for node in ast.walk(tree):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                yield block


def expression(source: str) -> ast.expr:
    """The tree of an expression."""
    return ast.parse(source, mode="eval").body


def call(function: str, *operands: ast.expr) -> ast.Call:
    """``function(*operands)``, where function is a name, or names with dots."""
    return ast.Call(func=expression(function), args=list(operands), keywords=[])


def innermost(function: Any) -> types.FunctionType | None:
    """The plain Python function inside all decorators, if there is one."""
    inner = inspect.unwrap(function)
    return inner if isinstance(inner, types.FunctionType) else None


@functools.lru_cache(maxsize=4096)
def parsed(code: types.CodeType) -> ast.FunctionDef | None:
    """The syntax tree of a function, if its source is there and is what runs. Not to be changed by the caller."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    definition = tree.body[0]
    definition.decorator_list = []
    ast.increment_lineno(definition, first - 1)
    again = _compiled(definition, code)
    same = again is not None and _instructions(again) == _instructions(code)
    return definition if same else None


def _instructions(code: types.CodeType) -> list[Any]:
    """What the code does, by name; how it calls an attribute depends on the imports around it, and is left out."""
    found: list[Any] = [code.co_varnames, code.co_freevars]
    for one in dis.get_instructions(code):
        jump = one.opcode in dis.hasjrel or one.opcode in dis.hasjabs
        value = _instructions(one.argval) if isinstance(one.argval, types.CodeType) else repr(one.argval)
        if one.opname not in ("PUSH_NULL", "CACHE", "EXTENDED_ARG", "NOP"):
            found.append((one.opname.replace("LOAD_METHOD", "LOAD_ATTR"), None if jump else value))
    return found


def rewritten(function: Any, edits: Edits, names: Mapping[str, Any]) -> Any:
    """A copy of ``function`` with these edits, in whose globals there are these names; decorators are copied with it.

    Raises:
        Refused: if a decorator around the function cannot be copied.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _edited(function, edits, names)
    replaced = rewritten(inner, edits, names)
    cells = function.__closure__ or ()
    if not any(_holds(cell, inner) for cell in cells):
        raise Refused(f"its forward is decorated by {function.__name__}, which cannot be copied")
    closure = tuple(types.CellType(replaced) if _holds(cell, inner) else cell for cell in cells)
    wrapper = _copy(function, function.__code__, function.__globals__, closure)
    wrapper.__wrapped__ = replaced
    return wrapper


def _holds(cell: Any, value: Any) -> bool:
    try:
        return bool(cell.cell_contents is value)
    except ValueError:  # an empty cell
        return False


def _edited(function: types.FunctionType, edits: Edits, names: Mapping[str, Any]) -> Any:
    definition = parsed(function.__code__)
    assert definition is not None
    tree = _Editor(edits, numbered(definition)).visit(definition)
    code = _compiled(ast.fix_missing_locations(tree), function.__code__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if code is None or not set(code.co_freevars) <= set(cells):
        raise Refused("its forward cannot be compiled again")
    namespace = {**function.__globals__, **names}
    # By this name Dynamo (torch 2.11) would look globals up in the module, where the fused ones are not.
    namespace.pop("__name__", None)
    return _copy(function, code, namespace, tuple(cells[name] for name in code.co_freevars))


class _Editor(ast.NodeTransformer):
    """Copies a tree, with the edits; the tree itself is shared, and stays."""

    def __init__(self, edits: Edits, numbers: Mapping[int, int]) -> None:
        self.edits, self.numbers = edits, numbers

    def visit(self, node: ast.AST) -> Any:
        number = self.numbers.get(id(node))
        copied = type(node)(**{name: self._field(value) for name, value in ast.iter_fields(node)})
        copied = ast.copy_location(copied, node)
        edit = None if number is None else self.edits.get(number)
        return copied if edit is None else ast.copy_location(edit(copied), node)

    def _field(self, value: Any) -> Any:
        if isinstance(value, ast.AST):
            return self.visit(value)
        return [self._field(item) for item in value] if isinstance(value, list) else value


def _compiled(definition: ast.FunctionDef, original: types.CodeType) -> types.CodeType | None:
    """The code of the function, as it is when closed over what the original is closed over."""
    body: list[ast.stmt] = [definition]
    if original.co_freevars:
        outside = ast.parse(f"def closed({', '.join(original.co_freevars)}): pass").body[0]
        assert isinstance(outside, ast.FunctionDef)
        outside.body, body = body, [outside]
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    flags = original.co_flags & _FEATURES
    try:
        outer = compile(module, original.co_filename, "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    return _find(outer, definition.name)


def _find(outer: types.CodeType, name: str) -> types.CodeType | None:
    for constant in outer.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == name:
                return constant
            if constant.co_name == "closed":
                return _find(constant, name)
    return None


def _copy(function: types.FunctionType, code: types.CodeType, namespace: dict[str, Any], closure: Any) -> Any:
    copied = types.FunctionType(code, namespace, function.__name__, function.__defaults__, closure or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copied, name, getattr(function, name))
    copied.__dict__.update(function.__dict__)
    return copied
