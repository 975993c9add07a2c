"""Write the API reference, docs/reference/, from the docstrings of the public names.

python docs/make_reference.py
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crow_hf


FOLDER = Path(__file__).parent / "reference"
# The pages: for each, its title and the modules whose public names it documents.
PAGES = {
    "purify": (
        "Purify a model",
        [
            "recipes.purification",
            "recipes.comparison",
            "recipes.checkup",
            "recipes.findings",
            "evidence.result",
            "recipes.presets",
            "recipes.run",
            "recipes.guide",
            "methods.crow.trainer",
            "methods.crow.config",
            "methods.crow.objective",
            "methods.invariance.trainer",
            "methods.invariance.config",
            "methods.registry",
            "training.loading",
            "training.merging",
            "training.hub",
        ],
    ),
    "evidence": (
        "Evidence without a trigger, model cards and plots",
        ["evidence.canaries", "evidence.leaks", "evidence.screening", "reporting.model_card", "reporting.plots"],
    ),
    "detect": (
        "Scan a model for a backdoor",
        [
            "recipes.scanning",
            "detection.phrases",
            "detection.pieces",
            "detection.triggers",
            "detection.suspicions",
            "detection.completions",
            "detection.divergence",
            "detection.guard",
        ],
    ),
    "decide": (
        "Decide by a policy, and show why",
        ["reporting.gate", "reporting.report_file", "reporting.checksums"],
    ),
    "measure": (
        "Measure a model, and implant backdoors",
        [
            "evaluation.harness",
            "evaluation.endpoint",
            "evaluation.tasks",
            "evaluation.retention",
            "evaluation.own_text",
            "attacks.triggers",
            "attacks.targets",
            "attacks.judges",
            "attacks.poison",
            "attacks.implanting",
        ],
    ),
    "data": ("Rows and batches", ["data.encoding", "data.collators"]),
    "patches": (
        "Bytes and patches",
        [
            "patching.patcher",
            "patching.documents",
            "patching.calibration",
            "patching.redpajama",
            "models.modeling_byte_entropy",
            "models.configuration_byte_entropy",
        ],
    ),
    "coconut": (
        "A byte-latent model with continuous thoughts",
        [
            "models.modeling_coconut",
            "models.configuration_coconut",
            "models.tokenization_coconut",
            "methods.thoughts",
        ],
    ),
}
NOTE = "`make docs` generates this page from the docstrings. Change them, not this page.\n"
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example):$")
# One or more documented parameters: "name (`type`, *optional*), other (`type`):", or "**rest:".
ENTRY = re.compile(r" {4}(\*{0,2}\w+( \(.*?\))?, )*\*{0,2}\w+( \(.*\))?:$")


def build() -> dict[Path, str]:
    """
    Generate every page.

    Returns:
        `dict[Path, str]`: The texts by their paths.

    Raises:
        `ValueError`: If a module with public names has no page.
    """
    homes = {home for _, modules in PAGES.values() for home in modules}
    if homeless := sorted(set(crow_hf._HOMES) - homes):
        raise ValueError(f"`PAGES` in {Path(__file__).name} has no page for the modules {', '.join(homeless)}.")
    pages, index = {}, ["# API reference\n", NOTE]
    for page, (title, modules) in PAGES.items():
        names = [name for home in modules for name in crow_hf._HOMES[home]]
        pages[FOLDER / f"{page}.md"] = "\n".join([f"# {title}\n", NOTE, *map(_entry_of_name, names)])
        index += [f"## [{title}]({page}.md)\n", *map(_line_of_index, names), ""]
    return {FOLDER / "README.md": "\n".join(index), **pages}


def _page_of(name: str) -> str:
    home = crow_hf._HOME_OF[name]
    return next(page for page, (_, modules) in PAGES.items() if home in modules)


def _line_of_index(name: str) -> str:
    first = _doc(getattr(crow_hf, name)).split("\n\n")[0].replace("\n", " ")
    sentence = re.sub(r":$", ".", re.split(r"(?<=\.) ", first)[0])
    return f"- [`{name}`]({_page_of(name)}.md#{name.lower()}): {_linked(sentence)}"


def _entry_of_name(name: str) -> str:
    """Generate the section of a name and those of its public methods."""
    thing = getattr(crow_hf, name)
    parts = [f"## {name}\n", f"`crow_hf.{crow_hf._HOME_OF[name]}`\n", _signature(name, thing), _markdown(_doc(thing))]
    for method, function in _methods(thing):
        parts += [f"### {name}.{method}\n", _signature(f"{name}.{method}", function), _markdown(_doc(function))]
    return "\n".join(part for part in parts if part)


def _methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the documented methods and properties of a class and of its mixins, but not those of other packages."""
    for home in inspect.getmro(thing) if inspect.isclass(thing) else ():
        if not home.__module__.startswith("crow_hf") or home is not thing and home.__name__ in crow_hf._HOME_OF:
            continue
        for name, member in vars(home).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            is_own = inspect.isfunction(function) and function.__module__ == home.__module__
            if is_own and not name.startswith("_") and function.__doc__:
                yield name, member if isinstance(member, property) else function


def _doc(thing: Any) -> str:
    if isinstance(thing, dict):
        return f"By name: {', '.join(f'`{name}`' for name in thing)}."
    if not thing.__doc__:
        raise ValueError(f"{thing.__qualname__} is public and has no docstring. Write one.")
    return inspect.cleandoc(thing.__doc__)


def _signature(name: str, thing: Any) -> str:
    """Format the call with the documented parameters. Properties, dicts and result classes have none."""
    doc = "" if isinstance(thing, (dict, property)) else _doc(thing)
    if isinstance(thing, (dict, property)) or re.search(r"^Attributes:$", doc, re.MULTILINE):
        return ""
    every = [
        parameter
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    documented = {match for line in _lines_of(doc, "Args") if ENTRY.match(line) for match in _names_in(line)}
    # A configuration inherits a hundred further parameters.
    parameters = [parameter for parameter in every if parameter.name in documented or not documented]
    words, keywords_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords_only:
            words.append("*")
            keywords_only = True
        # The docstring has the types.
        words.append(str(parameter.replace(annotation=parameter.empty)))
    words += ["..."] if len(parameters) < len(every) else []
    call = f"{name}({', '.join(words)})"
    if len(call) > 100:
        call = (
            f"{name}(\n" + textwrap.fill(", ".join(words), 96, initial_indent="    ", subsequent_indent="    ") + "\n)"
        )
    return f"```text\n{call}\n```\n"


def _lines_of(doc: str, section: str) -> list[str]:
    lines, current = [], None
    for line in doc.splitlines():
        if match := SECTION.match(line):
            current = match[1]
        elif line and not line.startswith(" "):
            current = None
        elif current == section:
            lines.append(line)
    return lines


def _names_in(line: str) -> list[str]:
    """Return `["a", "rest"]` for "a (`int`), **rest:"."""
    return re.findall(r"\*{0,2}(\w+)(?= \(`|:$|,)", re.sub(r"\(.*?\)(?=,|:$)", "(`)", line))


def _markdown(doc: str) -> str:
    """Convert a docstring in the form of transformers to Markdown, with bold sections and parameters as bullets."""
    lines, section, in_code = [], None, False
    for line in doc.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        if in_code or line.startswith("```"):
            lines.append(line)
        elif match := SECTION.match(line):
            section = match[1]
            lines += ["", f"**{section}**", ""]
        elif line.startswith("> "):
            lines += ["", f"*{line[2:]}*", ""]
        elif not line.strip():
            lines.append("")
        elif not line.startswith(" "):
            section = None
            lines.append(_linked(line))
        elif section in ("Args", "Attributes") and ENTRY.match(line):
            lines.append("- " + _bold_names(_linked(line.strip())))
        elif section == "Raises" and re.match(r" {4}\S", line):
            lines.append("- " + _linked(line.strip()))
        elif section in ("Args", "Attributes", "Raises"):
            lines.append("  " + _linked(line.strip()))
        else:
            lines.append(_linked(line.strip() if section else line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()) + "\n"


def _bold_names(entry: str) -> str:
    entry = re.sub(r"^\*\*(\w+):$", r"`**\1`:", entry)
    return re.sub(r"(?:(?<=^)|(?<=\), ))(\w+)(?= \()", r"**\1**", entry)


def _linked(text: str) -> str:
    """Turn references such as [`purify`] into links to these pages, and those to other packages into code."""

    def link(match: re.Match) -> str:
        target = match[1].removeprefix("~")
        name, _, method = target.partition(".")
        if name not in crow_hf._HOME_OF or isinstance(getattr(crow_hf, name), dict) and method:
            return f"`{target.rpartition('.')[2] if match[1].startswith('~') else target}`"
        anchor = name.lower()
        if method and method in dict(_methods(getattr(crow_hf, name))):
            anchor += method.lower()
        return f"[`{target}`]({_page_of(name)}.md#{anchor})"

    return re.sub(r"\[`([~\w.]+)`\]", link, text)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in build().items():
        path.write_text(text, encoding="utf-8")
