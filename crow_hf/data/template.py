"""Reads a chat template without running it, and says what could act on a prompt that no weight knows of.

A template turns messages into the text that the model sees. It is a program of the model's maker: it can test the
messages for a trigger, and write an order to the model beside them. Neither training nor measuring would show that,
where the trigger is unknown. An honest template arranges roles, special tokens and what the messages say, and looks at
the roles, at the number of messages and at the type of what they say.

What a message says is followed through variables, macros and filters. `tools`, `documents` and calls of tools are not.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from . import template_rules as rules
from .bounds import bounded
from .template_growth import find_growth
from .template_tree import arguments_of, called_by, constants_of, every, key_of, names_in


@dataclass(frozen=True)
class TemplateFinding:
    """
    Something in a chat template.

    Attributes:
        line (`int`):
            The number of the line in the template, from 1.
        found (`str`):
            What stands there, as a sentence.
        is_note (`bool`):
            Whether templates of well-known models do the same. Otherwise somebody should read the template.
    """

    line: int
    found: str
    is_note: bool = False

    def __str__(self) -> str:
        return f"Line {self.line}: {self.found}"


def read_templates(tokenizer: PreTrainedTokenizerBase | None) -> list[TemplateFinding]:
    """
    Read the chat templates of a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. It may have no template, one, or several by name.

    Returns:
        `list[TemplateFinding]`: As in [`read_template`].
    """
    templates: Any = getattr(tokenizer, "chat_template", None) or {}
    listed = templates.values() if isinstance(templates, dict) else [templates]
    return list(dict.fromkeys(finding for template in listed for finding in read_template(str(template))))


def read_template(template: str) -> list[TemplateFinding]:
    """
    Read a chat template without running it.

    Args:
        template (`str`):
            The template, in the dialect of transformers.

    Returns:
        `list[TemplateFinding]`: Decisions by what a message says or by the date, changes of what a message says, texts
        of the template's own, loops that may not end, and calls that transformers does not know. Those that are no
        notes come first.
    """
    if len(template) > rules.MAX_CHARACTERS:
        return [TemplateFinding(1, f"The template has {len(template)} characters, too many to read.")]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        with bounded():
            findings = _Reader(environment.parse(template), environment).read()
            growth = find_growth(environment.parse(template))
            findings += [TemplateFinding(node.lineno, found) for node, found in growth]
    except jinja2.TemplateSyntaxError as error:
        return [TemplateFinding(error.lineno, f"The template cannot be read: {error.message}.")]
    # Such as parentheses of great depth, and numbers of many digits.
    except (RecursionError, ValueError, OverflowError, MemoryError) as error:
        return [TemplateFinding(1, f"The template cannot be read: {type(error).__name__}.")]
    except TimeoutError as error:
        return [TemplateFinding(1, f"The template cannot be read: {error}.")]
    return sorted(dict.fromkeys(findings), key=lambda finding: (finding.is_note, finding.line))


class _Generation(Extension):
    """The tag `generation` of transformers, which marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Kind(IntEnum):
    """
    What a value is made of. The greater of two kinds is that of both together. A part of what a message says is a
    message too. What is taken from a collection of texts stays one, and what is taken from words is said.
    """

    OTHER, MESSAGES, MESSAGE, DATE, SAID, WORDS, TEXTS = range(7)


class _Reader:
    """Follows what messages say through a template, and collects findings."""

    def __init__(self, root: nodes.Template, environment: jinja2.Environment) -> None:
        self.root, self.environment = root, environment
        self.macros = {macro.name: macro for macro in root.find_all(nodes.Macro)}
        # Names that stand for one of the messages, until they get another value.
        self.whole: set[str] = set()
        # The kinds of names, of values in namespaces, and of what macros return. A macro stands before its own names.
        self.kinds = {"messages": _Kind.MESSAGES, "varargs": _Kind.TEXTS, "kwargs": _Kind.TEXTS}
        self.macro = ""
        # What the loop around a statement runs over.
        self.loop_over = _Kind.OTHER
        self.findings: list[TemplateFinding] = []

    def read(self) -> list[TemplateFinding]:
        for _ in range(rules.MAX_ROUNDS):
            before = dict(self.kinds)
            self.findings = []
            self.turns, self.in_system, self.explained = 1, False, 0
            self.text, self.text_line = "", 1
            self._write(self.root.body)
            self._end_text()
            if self.kinds == before:
                break
        else:
            self._find(self.root, "Its names depend on each other too deeply to be followed.")
        return self.findings

    def _find(self, node: nodes.Node, found: str, is_note: bool = False) -> None:
        self.findings.append(TemplateFinding(node.lineno, found, is_note))

    def _judge(self, node: nodes.Node, verb: str, kind: _Kind, others: Iterable[nodes.Node]) -> None:
        """Report what is done with a text, unless it only asks for nothing or for a mark."""
        values = [each for other in others for each in (constants_of(other) or [other])]
        words = [value for value in values if not isinstance(value, nodes.Node)]
        if len(words) == len(values) and words and not any(words):
            return
        texts = [word for word in words if isinstance(word, str) and word]
        is_note = 0 < len(texts) == len(values) and all(map(rules.MARKS.fullmatch, texts))
        quoted = f": {', '.join(map(repr, texts[:5]))}"[:200] if texts else ""
        subject = "the date" if kind == _Kind.DATE else "what a message says"
        self._find(node, f"It {verb} {subject}{quoted}.", is_note)

    # Statements

    def _write(self, body: Iterable[nodes.Node]) -> _Kind:
        """Follow statements, and return the kind of what they write."""
        return max((self._statement(node) for node in body), default=_Kind.OTHER)

    def _statement(self, node: nodes.Node) -> _Kind:
        if isinstance(node, nodes.Output):
            kinds = [self._kind(child) for child in node.nodes]
            for child in node.nodes:
                self._collect_text(child)
            return max(kinds, default=_Kind.OTHER)
        if isinstance(node, nodes.If):
            return self._branches(node)
        if isinstance(node, nodes.For):
            return self._loop(node)
        if isinstance(node, nodes.Macro):
            outer, self.macro = self.macro, f"{node.name}:"
            for name in node.args:
                self._assign(name, _Kind.OTHER)
            for name, default in zip(reversed(node.args), reversed(node.defaults), strict=False):
                self._assign(name, self._kind(default))
            self._keep(f"{node.name}()", self._explain(rules.EXPLAINING.search(node.name) is not None, node.body))
            self.macro = outer
            if any(getattr(called_by(call), "name", "") == node.name for call in node.find_all(nodes.Call)):
                self._find(node, f"The macro {node.name} calls itself.", is_note=True)
            return _Kind.OTHER
        if isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
            self._collect_text(node.node)
            return _Kind.OTHER
        if isinstance(node, nodes.AssignBlock):
            kind = self._write(node.body)
            self._assign(node.target, kind if node.filter is None else self._filter(node.filter, kind))
            return _Kind.OTHER
        if isinstance(node, nodes.FilterBlock):
            return self._filter(node.filter, self._write(node.body))
        if isinstance(node, nodes.CallBlock):
            for name in node.args:
                self._assign(name, _Kind.TEXTS)
            return max(self._kind(node.call), self._write(node.body))
        if isinstance(node, nodes.With):
            for target, value in zip(node.targets, node.values, strict=True):
                self._assign(target, self._kind(value))
            return self._write(node.body)
        if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            self._find(node, "It loads another template.")
        children = list(node.iter_child_nodes())
        return max(
            (self._kind(each) if isinstance(each, nodes.Expr) else self._statement(each) for each in children),
            default=_Kind.OTHER,
        )

    def _branches(self, node: nodes.If) -> _Kind:
        self._kind(node.test)
        values = [each.value for each in every(node.test, nodes.Const)]
        explains = (0 in values and "system" in values) or any(map(rules.EXPLAINING.search, names_in(node.test)))
        branches: list[list[Any]] = [node.body, node.elif_, node.else_]
        return max(self._explain(explains, branch) for branch in branches)

    def _explain(self, explains: bool, body: list[nodes.Node]) -> _Kind:
        """Follow a block of statements, whose texts its condition or its name may explain."""
        self._end_text()
        self.explained += explains
        kind = self._write(body)
        self._end_text()
        self.explained -= explains
        return kind

    def _loop(self, node: nodes.For) -> _Kind:
        kind = self._kind(node.iter)
        items = {_Kind.MESSAGES: _Kind.MESSAGE, _Kind.SAID: _Kind.MESSAGE, _Kind.WORDS: _Kind.SAID}
        self._assign(node.target, items.get(kind, kind))
        if kind == _Kind.MESSAGES and isinstance(node.target, nodes.Name):
            self.whole.add(self.macro + node.target.name)
        if node.test is not None:
            self._kind(node.test)
        if node.recursive:
            self._find(node, "A loop calls itself, so that it may not end.")
        turns, self.turns = self.turns, self.turns * self._length(node.iter)
        if self.turns > rules.MAX_TURNS:
            self._find(node, f"Nested loops take {self.turns} turns or more.")
        over, self.loop_over = self.loop_over, kind
        written = self._explain(False, [*node.body, *node.else_])
        self.turns, self.loop_over = turns, over
        return written

    def _length(self, iterable: nodes.Node) -> int:
        """The number of turns of a loop. One over messages counts as one."""
        if getattr(called_by(iterable), "name", "") != "range":
            return 1
        numbers = [each.value for each in every(iterable, nodes.Const) if isinstance(each.value, int)]
        is_counted = any(each.name in ("length", "count") for each in every(iterable, nodes.Filter))
        if not is_counted and set(names_in(iterable)) - {"range", "loop", "loop.index0", "loop.index"}:
            self._find(iterable, "A loop has a computed number of turns, which may be large.")
        return max([1, *map(abs, numbers)])

    def _assign(self, target: Any, kind: _Kind) -> None:
        if isinstance(target, (nodes.Tuple, nodes.List)):
            for item in target.items:
                self._assign(item, kind)
            return
        self._keep(f".{target.attr}" if isinstance(target, nodes.NSRef) else self.macro + target.name, kind)

    def _keep(self, name: str, kind: _Kind) -> None:
        self.whole.discard(name)
        self.kinds[name] = max(kind, self.kinds.get(name, _Kind.OTHER))

    # Texts of the template's own

    def _collect_text(self, node: nodes.Node) -> None:
        """Collect constants that are written one after the other, up to something that is not constant."""
        if isinstance(node, nodes.TemplateData) or (isinstance(node, nodes.Const) and isinstance(node.value, str)):
            self.text_line = self.text_line if self.text else node.lineno
            self.text += node.data if isinstance(node, nodes.TemplateData) else node.value
        elif isinstance(node, (nodes.Getattr, nodes.Getitem)):
            self._collect_text(node.node)
            if key_of(node) == "role":
                self.in_system = False
        elif isinstance(node, (nodes.Name, nodes.Compare, nodes.Test)) or isinstance(called_by(node), nodes.Name):
            self._end_text()
        else:
            for child in node.iter_child_nodes():
                self._collect_text(child)

    def _end_text(self) -> None:
        text, self.text = self.text, ""
        for role in rules.ROLE.finditer(text):
            self.in_system = role[1] is not None
        rest = rules.MARKER.sub(" ", text)
        if len(re.findall(r"\w+", rest)) > 3 or sum(letter.isalpha() and letter > "\u024f" for letter in rest) > 5:
            shown = " ".join(rest.split())
            found = f"It writes a text of its own: {shown[:200]!r}."
            # Before the first user speaks, or where tools are described, well-known templates do so too.
            self.findings.append(TemplateFinding(self.text_line, found, self.in_system or self.explained > 0))

    # Expressions

    def _kind(self, node: nodes.Node) -> _Kind:
        """Follow an expression, and return its kind."""
        if isinstance(node, nodes.Name):
            return self.kinds.get(self.macro + node.name, self.kinds.get(node.name, _Kind.OTHER))
        if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            kind = max(map(self._kind, node.iter_child_nodes()), default=_Kind.OTHER)
            return _Kind.TEXTS if kind >= _Kind.DATE else kind
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._part(node)
        if isinstance(node, nodes.Filter):
            return self._filter(node, _Kind.OTHER if node.node is None else self._kind(node.node))
        if isinstance(node, nodes.Call):
            return self._call(node)
        if isinstance(node, nodes.Compare):
            is_member = all(operand.op in ("in", "notin") for operand in node.ops)
            self._compare(node, [node.expr, *(operand.expr for operand in node.ops)], is_member)
            return _Kind.OTHER
        if isinstance(node, nodes.Test):
            kind, arguments = self._kind(node.node), arguments_of(node)
            if node.name not in self.environment.tests:
                self._find(node, f"It uses the test {node.name!r}, which transformers does not know.")
            if arguments:
                self._compare(node, [node.node, *arguments], node.name == "in")
            elif kind >= _Kind.MESSAGE and node.name not in rules.TYPES:
                self._judge(node, "decides by", kind, [])
            return _Kind.OTHER
        if isinstance(node, nodes.Pair):
            self._pair(node, getattr(node.key, "value", None), self._kind(node.key), self._kind(node.value))
        kind = max(map(self._kind, node.iter_child_nodes()), default=_Kind.OTHER)
        if isinstance(node, nodes.BinExpr) and kind >= _Kind.DATE:
            if not isinstance(node, (nodes.Add, nodes.Mod, nodes.And, nodes.Or)):
                self._judge(node, "computes with", kind, [])
        if isinstance(node, (nodes.Concat, nodes.Mod)):
            return _written(kind)
        return _Kind.OTHER if isinstance(node, nodes.Not) else kind

    def _pair(self, node: nodes.Node, key: Any, by: _Kind, kind: _Kind) -> None:
        """Report a pair of a dictionary whose key is a message, or whose key hides one from the reader."""
        if by >= _Kind.MESSAGE:
            self._judge(node, "looks something up by", by, [])
        elif kind >= _Kind.MESSAGES and (key is None or key in rules.NOT_SAID):
            self._judge(node, "puts under another name", kind, [])

    def _compare(self, node: nodes.Node, operands: Sequence[nodes.Node], is_member: bool = False) -> None:
        kinds = list(map(self._kind, operands))
        # Texts are compared with messages and their parts only if these are texts.
        least = _Kind.DATE if is_member and len(str(getattr(operands[0], "value", ""))) > 1 else _Kind.MESSAGES
        said = [operand for operand, kind in zip(operands, kinds, strict=True) if kind >= least]
        others = [operand for operand in operands if operand not in said]
        is_length = all(getattr(each, "name", getattr(each, "attr", "")) in rules.COUNTING for each in said)
        if is_length and all(isinstance(each, nodes.Const) and each.value in (0, 1) for each in others):
            return
        if said and not others:
            self._find(node, "It compares what messages say with each other.", is_note=True)
        elif said:
            self._judge(node, "decides by", max(kinds), others)

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> _Kind:
        """The kind of `node.attr` or `node[arg]`."""
        key, whole = key_of(node), self._kind(node.node)
        if isinstance(key, str) and key.startswith("_"):
            self._find(node, f"It reaches for {key!r}, the inside of an object of Python.")
        if isinstance(node.node, nodes.Name):
            if node.node.name == "loop" and key in ("previtem", "nextitem"):
                return _Kind.MESSAGE
            if node.node.name == "loop" and key in rules.COUNTING and self.loop_over >= _Kind.DATE:
                # It says how long a text is.
                return _Kind.SAID
        if whole == _Kind.OTHER and (value := self.kinds.get(f".{key}")) is not None:
            return value
        by = self._kind(node.arg) if isinstance(node, nodes.Getitem) else _Kind.OTHER
        if by >= _Kind.MESSAGE:
            self._judge(node, "looks something up by", by, [node.node])
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        if whole == _Kind.MESSAGES:
            return _Kind.MESSAGES if is_slice else _Kind.MESSAGE
        if whole >= _Kind.MESSAGE and key in rules.NOT_SAID:
            return _Kind.OTHER
        if is_slice and whole >= _Kind.DATE:
            self._judge(node, "cuts", whole, [])
        is_said = whole == _Kind.MESSAGE or (whole == _Kind.WORDS and not is_slice)
        return max(_Kind.SAID if is_said else whole, by)

    def _filter(self, node: nodes.Filter, kind: _Kind) -> _Kind:
        """The kind of a filter of a value of this kind."""
        name, arguments = node.name, list(node.args)
        given = max(map(self._kind, arguments_of(node)), default=_Kind.OTHER)
        both = max(kind, given)
        attribute = [each.value for each in node.kwargs if each.key == "attribute"]
        if name not in self.environment.filters:
            self._find(node, f"It uses the filter {name!r}, which transformers does not know.")
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            self._find(node, f"It unpacks the arguments of the filter {name!r}, so that they cannot be read.")
        if name == "attr" and arguments:
            return self._part(nodes.Getitem(node.node, arguments[0], "load", lineno=node.lineno))
        if name == "map" and attribute:
            is_plain = getattr(attribute[0], "value", None) in rules.NOT_SAID and given == _Kind.OTHER
            return _Kind.OTHER if is_plain or both == _Kind.OTHER else _Kind.TEXTS
        if name in rules.ORDERING and both != _Kind.OTHER:
            place = rules.ORDERING[name]
            keys = attribute or arguments[place : place + 1]
            if not keys or getattr(keys[0], "value", None) not in rules.NOT_SAID:
                self._judge(node, "decides by", max(both, _Kind.SAID), [])
            return _Kind.MESSAGE if name in ("min", "max") and kind == _Kind.MESSAGES else both
        if name in rules.SELECTING and both != _Kind.OTHER:
            has_key = name.endswith("attr")
            key = getattr(arguments[0], "value", None) if arguments and has_key else None
            test, compared = arguments[1:2] if has_key else arguments[:1], arguments[2:]
            is_plain = not test or getattr(test[0], "value", None) in rules.TYPES
            if given >= _Kind.DATE:
                self._judge(node, "decides by", given, [])
            elif key not in rules.NOT_SAID and not is_plain and (has_key or kind >= _Kind.DATE):
                self._judge(node, "decides by", max(kind, _Kind.SAID), compared or arguments[1:])
            return both
        if kind != _Kind.OTHER and name == "map" and arguments:
            name, kind = getattr(arguments[0], "value", name), max(kind, _Kind.TEXTS)
            arguments = arguments[1:]
        if kind in (_Kind.MESSAGES, _Kind.MESSAGE) and name in rules.OF_MESSAGES:
            if name in ("first", "last", "random"):
                return _Kind.MESSAGE
            return {"length": _Kind.OTHER, "count": _Kind.OTHER, "list": kind, "reverse": kind}.get(name, _Kind.TEXTS)
        kind, given = _written(kind), _written(given)
        if kind >= _Kind.DATE and name not in rules.KEEPING:
            self._judge(node, "changes", kind, arguments[:1] if name in rules.SPLITTING else arguments)
        elif given >= _Kind.DATE and name not in rules.KEEPING:
            self._judge(node, "computes with", given, [] if node.node is None else [node.node])
        return max(_Kind.SAID if kind == _Kind.WORDS and name in ("first", "last") else kind, given)

    def _call(self, node: nodes.Call) -> _Kind:
        arguments = arguments_of(node)
        given, called = max(map(self._kind, arguments), default=_Kind.OTHER), node.node
        unpacked = arguments[len(node.args) + len(node.kwargs) :]
        if isinstance(called, nodes.Name):
            if called.name in self.macros:
                targets = [target.name for target in self.macros[called.name].args]
                for name, value in [
                    *zip(targets, node.args, strict=False),
                    *((each.key, each.value) for each in node.kwargs),
                    *((name, value) for name in targets for value in unpacked),
                ]:
                    self._keep(f"{called.name}:{name}", self._kind(value))
                return self.kinds.get(f"{called.name}()", _Kind.OTHER)
            if called.name not in rules.FUNCTIONS:
                self._find(node, f"It calls {called.name!r}, which transformers does not know.")
            if called.name == "namespace":
                for each in node.kwargs:
                    self._keep(f".{each.key}", self._kind(each.value))
                given = max(map(self._kind, [*node.args, *unpacked]), default=_Kind.OTHER)
            copied = node.args[0] if node.args else None
            is_copy = isinstance(copied, nodes.Name) and self.macro + copied.name in self.whole
            if called.name in ("dict", "namespace") and not is_copy:
                # A list of pairs may have messages as keys.
                self._pair(node, "", max(map(self._kind, node.args), default=_Kind.OTHER), _Kind.OTHER)
            if called.name == "dict":
                for each in node.kwargs:
                    self._pair(node, each.key, _Kind.OTHER, self._kind(each.value))
                if is_copy:
                    return _Kind.MESSAGE
            kept = _Kind.TEXTS if given >= _Kind.MESSAGES else given
            returned = {"strftime_now": _Kind.DATE, "caller": _Kind.TEXTS, "raise_exception": _Kind.OTHER}
            return returned.get(called.name, kept)
        if not isinstance(called, (nodes.Getattr, nodes.Getitem)):
            self._find(node, "It calls something computed.")
            return max(given, self._kind(called))
        name, owner = key_of(called), self._kind(called.node)
        if name not in rules.METHODS or name.startswith("_"):
            self._find(node, f"It calls {name!r}, which is no method of texts, lists or dictionaries.")
        if name == "get" and node.args:
            return self._part(nodes.Getitem(called.node, node.args[0], "load", lineno=node.lineno))
        if name == "fromkeys":
            self._pair(node, "", given, _Kind.OTHER)
        if owner in (_Kind.MESSAGES, _Kind.MESSAGE) and name in dir(dict):
            return {"items": _Kind.TEXTS, "values": _Kind.TEXTS, "get": _Kind.SAID}.get(name, owner)
        owner, given = _written(owner), _written(given)
        if owner >= _Kind.DATE and name in rules.SPLITTING:
            self._judge(node, "cuts or changes", owner, node.args[:1])
        elif max(owner, given) >= _Kind.DATE and (name not in rules.KEEPING or (name == "count" and arguments)):
            self._judge(node, "decides by", max(owner, given), arguments if owner >= _Kind.DATE else [called.node])
            return _Kind.OTHER
        return _Kind.WORDS if owner == _Kind.SAID and "split" in name else max(owner, given)


def _written(kind: _Kind) -> _Kind:
    """The kind of a text that values were written into."""
    return _Kind.SAID if kind in (_Kind.MESSAGES, _Kind.MESSAGE) else kind
