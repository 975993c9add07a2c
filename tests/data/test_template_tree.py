"""Questions about expressions of a chat template, answered by hand."""

import jinja2
import pytest
from jinja2 import nodes

from crow_hf.data.template_tree import arguments_of, called_by, constants_of, every, key_of, names_in


def expression(text):
    (output,) = jinja2.Environment().parse("{{ " + text + " }}").body
    return output.nodes[0]


@pytest.mark.parametrize(
    ("text", "constants", "names"),
    [("'a' ~ 1", ["a", 1], []), ("a ~ 'b'", [], ["a"]), ("loop.index + 1", [], ["loop", "loop.index"])],
)
def test_constants_and_names(text, constants, names):
    """Fails if a value with a name is taken for constant, or the expression itself is left out."""
    node = expression(text)
    assert (constants_of(node), names_in(node)) == (constants, names)
    assert every(node, type(node))[0] is node


def test_calls_and_keys():
    call = expression("f(a, *c, b=1, **d)")
    assert [getattr(each, "name", 1) for each in arguments_of(call)] == ["a", 1, "c", "d"]
    assert called_by(call).name == "f" and called_by(expression("f")) is None
    texts = ("a.b", "a['b']", "a[0]", "a[b]", "a[1:]")
    assert [key_of(expression(text)) for text in texts] == ["b", "b", 0, None, None]
    assert isinstance(expression("a.b"), nodes.Getattr)
