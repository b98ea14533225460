"""What the source of a class tells of how it runs: what a block returns, what it gives its children, how a list is run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_CHECKPOINTED = "(checkpointed)"  # a loop that training takes, which doesn't call its blocks itself


@cache
def methods_of(module_class: type[nn.Module]) -> dict[str, ast.FunctionDef]:
    """The methods of a class and its bases (but for ``nn.Module``) by name; none where no source is at hand."""
    found: dict[str, ast.FunctionDef] = {}
    for base in module_class.__mro__:
        if base is nn.Module or not issubclass(base, nn.Module):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made in a shell, or generated
            return {}
        for node in tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, node)
    return found


@cache
def argument_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's ``forward`` behind the module itself, whatever its author calls that."""
    return tuple(inspect.signature(object.__new__(module_class).forward).parameters)


def accepts(module_class: type[nn.Module], name: str) -> bool:
    """Whether a class's ``forward`` takes an argument of that name."""
    parameters = inspect.signature(module_class.forward).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def returned(module_class: type[nn.Module]) -> tuple[str, ...] | None:
    """What ``forward`` returns: a name for each value, empty where it is an expression; ``None`` where that can't be told."""
    forward = methods_of(module_class).get("forward")
    if forward is None or (forward.returns is not None and "dict" in ast.unparse(forward.returns).lower()):
        return None
    several = forward.returns is not None and "tuple" in ast.unparse(forward.returns).lower()
    found = {_names(node.value) for node in _own_nodes(forward) if isinstance(node, ast.Return)}
    if len({len(names) for names in found}) != 1:
        return None
    names = next(iter(found)) if len(found) == 1 else ("",) * len(next(iter(found)))
    return None if several and len(names) == 1 else names


def given(module_class: type[nn.Module], child: str) -> list[str] | None:
    """The variables in the arguments of the calls of ``self.<child>``; ``None`` where no call is found."""
    calls = [
        node
        for name, method in methods_of(module_class).items()
        if name != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and _is_own(node.func, child)
    ]
    if not calls:
        return None
    found: list[str] = []
    for call in calls:
        for argument in call.args:
            found += _loaded(argument)
        for keyword in call.keywords:
            found += _loaded(keyword.value)
    return found


def chained(owner_class: type[nn.Module], name: str) -> str | int | None:
    """The argument through which the blocks of the list ``self.<name>`` hand on one tensor that nothing else reads.

    Certain where the one place that uses the list calls all of it, or is a loop over it in which what a block returns goes
    into a variable that is read for the value of that same variable only.

    Returns:
        The argument's name, or its place in the call; ``None`` where it isn't certain.
    """
    methods = methods_of(owner_class)
    nodes = [node for title, method in methods.items() if title != "__init__" for node in ast.walk(method)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    measured = {argument for call in calls if ast.unparse(call.func) == "len" for argument in call.args}
    used = [node for node in nodes if _is_own(node, name) and node not in measured]
    once = list(_run_once(methods["forward"])) if "forward" in methods else []
    if len(used) == 1 and any(call.func is used[0] for call in calls):
        call = next((node for node in once if isinstance(node, ast.Call) and node.func is used[0]), None)
        return 0 if call is not None and len(call.args) == 1 and not call.keywords else None
    loops = [node for node in once if isinstance(node, ast.For) and _block_of(node, name)]
    if len(loops) != len(used) or not (len(loops) == 1 or (len(loops) == 2 and _are_alternatives(once, *loops))):
        return None
    places = [_handed_on(loop, _block_of(loop, name)) for loop in loops]
    if None in places:
        return None
    return next((place for place in places if place != _CHECKPOINTED), None)


def mentions(module_class: type[nn.Module], name: str) -> bool:
    """Whether the source of a class reads ``<anything>.<name>``; also where its source is not at hand."""
    methods = methods_of(module_class)
    nodes = (node for method in methods.values() for node in ast.walk(method))
    return not methods or any(isinstance(node, ast.Attribute) and node.attr == name for node in nodes)


def _run_once(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function that a call of it doesn't reach several times; of a loop the loop alone."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.For, ast.While, ast.FunctionDef, ast.Lambda, ast.comprehension)):
            waiting += ast.iter_child_nodes(node)


def _are_alternatives(nodes: list[ast.AST], one: ast.For, other: ast.For) -> bool:
    """Whether a call runs one of two loops only, as where one of them is for training."""
    for node in nodes:
        if isinstance(node, ast.If):
            sides = [[part for statement in side for part in ast.walk(statement)] for side in (node.body, node.orelse)]
            if any(one in side for side in sides) and any(other in side for side in sides):
                return not any(one in side and other in side for side in sides)
    return False


def _handed_on(loop: ast.For, block: str) -> str | int | None:
    """Where the blocks of a loop are given the variable that they hand on; ``None`` where that isn't certain."""
    nodes = [node for statement in loop.body for node in ast.walk(statement)]
    streams = {
        ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign) and block in _loaded(node.value)
    }
    stream = next(iter(streams), "")
    if len(streams) != 1 or loop.orelse:
        return None
    allowed: set[ast.AST] = set()
    places: set[str | int | None] = set()
    for node in nodes:
        if not (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [stream]):
            continue
        allowed.update(ast.walk(node))
        for call in (part for part in ast.walk(node.value) if isinstance(part, ast.Call)):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            read = {variable for argument in arguments for variable in _loaded(argument)}
            if ast.unparse(call.func) == block:
                places.add(_place(call, stream))
            elif read & {stream, block} and not (block in read and "checkpoint" in ast.unparse(call.func)):
                return None  # who knows what else reads it there
    if any(isinstance(node, ast.Name) and node.id in (stream, block) and node not in allowed for node in nodes):
        return None
    return places.pop() if len(places) == 1 else None if places else _CHECKPOINTED


def _names(value: ast.expr | None) -> tuple[str, ...]:
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    return tuple(part.id if isinstance(part, ast.Name) else "" for part in values)


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions within it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _is_own(node: ast.AST, name: str) -> bool:
    """Whether it is ``self.<name>``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _loaded(node: ast.AST) -> list[str]:
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]


def _block_of(loop: ast.For, name: str) -> str:
    """The variable of the block in ``for block in self.<name>`` or in an enumeration of it, else empty."""
    source, target = loop.iter, loop.target
    if isinstance(source, ast.Call) and ast.unparse(source.func) == "enumerate" and isinstance(target, ast.Tuple):
        source, target = source.args[0], target.elts[1]
    return target.id if _is_own(source, name) and isinstance(target, ast.Name) else ""


def _place(call: ast.Call, stream: str) -> str | int | None:
    """Where a call is given the stream itself, and nothing else that is made of it."""
    arguments: list[tuple[str | int | None, ast.expr]] = [*enumerate(call.args)]
    arguments += [(keyword.arg, keyword.value) for keyword in call.keywords]
    places = [place for place, value in arguments if stream in _loaded(value)]
    plain = [place for place, value in arguments if isinstance(value, ast.Name) and value.id == stream]
    return places[0] if len(places) == 1 and places == plain else None
