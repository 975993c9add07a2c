"""Small questions about the syntax tree of a chat template."""

from typing import Any

from jinja2 import nodes


def every(node: nodes.Node, types: Any) -> list[Any]:
    """The nodes of some types, with the node itself."""
    return [*([node] if isinstance(node, types) else []), *node.find_all(types)]


def arguments_of(node: Any) -> list[nodes.Expr]:
    """All arguments of a call, a filter or a test. Those that are unpacked come last."""
    unpacked = [each for each in (node.dyn_args, node.dyn_kwargs) if each is not None]
    return [*node.args, *(each.value for each in node.kwargs), *unpacked]


def constants_of(node: nodes.Node) -> list[Any]:
    """The values of all constants of an expression. None if it has names."""
    return [] if every(node, nodes.Name) else [each.value for each in every(node, nodes.Const)]


def names_in(node: nodes.Node) -> list[str]:
    """The names of an expression, also with an attribute, as `loop.index`."""
    names = [each.name for each in every(node, nodes.Name)]
    owned = [each for each in every(node, nodes.Getattr) if isinstance(each.node, nodes.Name)]
    return names + [f"{each.node.name}.{each.attr}" for each in owned]


def called_by(node: nodes.Node) -> nodes.Node | None:
    """What is called, if the node is a call."""
    return node.node if isinstance(node, nodes.Call) else None


def key_of(node: nodes.Getattr | nodes.Getitem) -> Any:
    """The key of `node.attr` or `node[arg]` if it is constant."""
    return node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
