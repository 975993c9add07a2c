"""The words by which the reader of chat templates tells what is harmless from what is not."""

import re


# Longer templates are not read. The longest of known models have some 20,000 characters.
MAX_CHARACTERS = 200_000
# Rounds after which every name should have its kind.
MAX_ROUNDS = 20
# A number, or a product of the lengths of nested loops, above which a template takes long or much memory.
MAX_NUMBER, MAX_TURNS = 10_000, 100_000
# Rounds after which a list that holds its like is above the greatest size, and one that gets another item is not.
SIZE_ROUNDS, MAX_SIZE = 64, 10**6
# Values of a message, or of a part of one, that are not what it says.
NOT_SAID = frozenset("role type name grouper id tool_calls tool_call_id function_call".split())
FUNCTIONS = frozenset("range dict namespace raise_exception strftime_now cycler joiner caller".split())
METHODS = frozenset([*dir(str), *dir(list), *dir(dict), "next", "reset"])
# Filters and methods that leave a text what it is, and tests of its type.
KEEPING = frozenset(
    "trim strip lstrip rstrip string tojson safe e escape default d indent join format list first last items values "
    "keys dictsort length count upper lower capitalize title append".split()
)
SPLITTING = frozenset("split rsplit partition rpartition replace removeprefix removesuffix".split())
# Filters that compare values with each other, with the place of the key among their arguments.
ORDERING = {"groupby": 0, "sort": 2, "unique": 1, "min": 1, "max": 1}
# Filters of a list of messages, or of a message.
OF_MESSAGES = KEEPING | {"random", "reverse"}
# Filters and attributes of loops that count. Whether there are none or one, or more, may always be asked.
COUNTING = frozenset("length count index index0 revindex revindex0".split())
SELECTING = frozenset("select reject selectattr rejectattr".split())
TYPES = frozenset(
    "string mapping iterable sequence none defined undefined number boolean true false callable integer float".split()
)
# Marks of thoughts and of tools, which templates look for in earlier answers.
MARKS = re.compile(
    r"(?:\s|</?(?:think|thinking|thought|reasoning|answer|tool_calls?|tool_response|tool_results?)>|\[/?THINK\]"
    r"|/(?:no_?)?think|<\|?channel\|?>(?:analysis|final|commentary)?(?:<\|message\|>)?|null)*"
)
# What marks a role: special tokens, and a word beside them or alone in its line.
MARKER = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{1,40}\]")
ROLE = re.compile(
    r"(?:^|[>|｜<#\[\n])\s*(?:(system|developer|sys)|user|human|assistant|model|tool|inst)(?:$|[<>|｜_:\]\n])",
    re.IGNORECASE,
)
# A variable of such a name explains a text of the template's own.
EXPLAINING = re.compile(r"system|tool|function|document|date|think|reason", re.IGNORECASE)
