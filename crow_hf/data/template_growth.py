"""Finds values of a chat template that may take long or fill the memory, without computing them."""

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes

from . import template_rules as rules
from .template_tree import key_of


def find_growth(root: nodes.Template) -> Iterator[tuple[nodes.Node, str]]:
    """
    Find large numbers, powers, and values that double again and again.

    A list that holds the same list twice takes no memory, but comparing or writing it visits both. After forty such
    steps, one operation of Python never ends, and nothing can stop it.

    Args:
        root (`jinja2.nodes.Template`):
            The template as a syntax tree, whose names are changed.

    Returns:
        `Iterator[tuple[jinja2.nodes.Node, str]]`: Where something is found, and what, as a sentence.
    """
    for number in root.find_all(nodes.Const):
        if isinstance(number.value, (int, float)) and abs(number.value) > rules.MAX_NUMBER:
            yield number, "It holds a large number, which can make it take long or fill the memory."
    for power in root.find_all(nodes.Pow):
        yield power, "It computes a power, which can make it take long or fill the memory."
    _divide_names(root)
    assignments, sizes = list(_assignments(root)), dict[str, int]()
    _join_namespaces(root, assignments)
    for target, value in assignments:
        if _summands(value).count(_name(target)) > 1:
            yield target, f"{_name(target)} is put together with itself, so that it can grow without bound."
    # Each round is a turn of all loops. Only what doubles, or the like, passes the bound.
    for _ in range(rules.SIZE_ROUNDS):
        before = dict(sizes)
        for target, value in assignments:
            size = _size(value, sizes)
            for each in target.items if isinstance(target, (nodes.Tuple, nodes.List)) else [target]:
                sizes[_name(each)] = max(size, sizes.get(_name(each), 0))
            if size > rules.MAX_SIZE:
                yield target, "A list holds its like again and again, so that it can take very long."
                return
        if sizes == before:
            return


def _divide_names(root: nodes.Template) -> None:
    """Give the variables of each loop and each macro names of their own: a number follows after a space."""
    # Inner scopes come first, and keep what they get.
    scopes: list[Any] = list(root.find_all((nodes.For, nodes.Macro)))
    for number, scope in enumerate(reversed(scopes)):
        targets = [scope.target] if isinstance(scope, nodes.For) else scope.args
        owned = {each.name for target in targets for each in [target, *target.find_all(nodes.Name)] if _name(each)}
        for part in [*targets, *scope.body, *([scope.test] if getattr(scope, "test", None) else [])]:
            for each in [part, *part.find_all((nodes.Name, nodes.NSRef))]:
                if isinstance(each, (nodes.Name, nodes.NSRef)) and each.name in owned:
                    each.name = f"{each.name} {number}"


def _join_namespaces(root: nodes.Template, assignments: list[tuple[Any, nodes.Node]]) -> None:
    """Give one name to all variables that may hold the same namespace."""
    # What has attributes that are set is one.
    joined = {each.name: each.name for each in root.find_all(nodes.NSRef)}
    for _ in range(rules.MAX_ROUNDS):
        before = dict(joined)
        for target, value in assignments:
            targets = target.items if isinstance(target, (nodes.Tuple, nodes.List)) else [target]
            names = [*map(_name, targets), *_held(value)]
            if same := {joined[name] for name in names if name in joined}:
                joined |= dict.fromkeys(names, min(same))
                joined |= {name: min(same) for name, each in joined.items() if each in same}
        if joined == before:
            break
    for each in root.find_all((nodes.Name, nodes.NSRef)):
        if isinstance(each, (nodes.Name, nodes.NSRef)):
            each.name = joined.get(each.name, each.name)


def _held(node: nodes.Node) -> list[str]:
    """The names of what a value is or holds. A loop, a macro or an index takes it out of a list."""
    if isinstance(node, (nodes.List, nodes.Tuple, nodes.CondExpr, nodes.And, nodes.Or)):
        return [name for child in node.iter_child_nodes(exclude=["test"]) for name in _held(child)]
    if isinstance(node, nodes.Getitem) and not isinstance(key_of(node), str):
        return _held(node.node)
    return [node.name] if isinstance(node, nodes.Name) else []


def _assignments(root: nodes.Template) -> Iterator[tuple[Any, nodes.Node]]:
    """Yield what gets a value, and the value, in the order of the template."""
    macros = {macro.name: macro for macro in root.find_all(nodes.Macro)}
    for node in root.find_all((nodes.Assign, nodes.For, nodes.With, nodes.Call)):
        if isinstance(node, nodes.Assign):
            yield node.target, node.node
        elif isinstance(node, nodes.For):
            yield node.target, node.iter
        elif isinstance(node, nodes.With):
            yield from zip(node.targets, node.values, strict=True)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in macros:
            targets = {target.name.split()[0]: target for target in macros[node.node.name].args}
            yield from zip(targets.values(), node.args, strict=False)
            yield from ((targets[each.key], each.value) for each in node.kwargs if each.key in targets)


def _name(node: nodes.Node) -> str:
    """The name of a variable, as `x` or `namespace.x`, or nothing."""
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, (nodes.Getattr, nodes.Getitem)):
        return f"{_name(node.node)}.{key_of(node)}"
    return node.name if isinstance(node, nodes.Name) else ""


def _summands(node: nodes.Node) -> list[str]:
    """The names that are put together."""
    if isinstance(node, (nodes.Add, nodes.Concat)):
        return [name for child in node.iter_child_nodes() for name in _summands(child)]
    return [name] if (name := _name(node)) else []


def _size(node: nodes.Node, sizes: dict[str, int]) -> int:
    """The number of values in a list or a dictionary, where one counts as often as it is visited. Others have none."""
    if isinstance(node, (nodes.Name, nodes.Getattr, nodes.Getitem)) and _name(node) in sizes:
        return sizes[_name(node)]
    called = _name(node.node) if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) else None
    is_text = called is not None and called not in rules.FUNCTIONS
    if is_text or isinstance(node, (nodes.Compare, nodes.Test, nodes.Not)):
        return 0
    parts = [_size(child, sizes) for child in node.iter_child_nodes(exclude=["test"])]
    if called == "dict" or isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
        return sum(max(1, part) for part in parts)
    if isinstance(node, nodes.Mul):
        return 2 * max(parts)
    return sum(parts) if isinstance(node, (nodes.Add, nodes.Concat)) else max(parts, default=0)
