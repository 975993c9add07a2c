"""`crow-hf reproduce`: repeat a purification from its report, and compare the weights."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.visible import printable
from ...reporting.provenance import checksums_of_model
from ...reporting.report_file import read_report
from ...secrets import HIDDEN
from ..arguments import make_arguments, read_arguments
from ..options import ReproduceArguments
from ..shared import check_output
from . import purify


# What decides the weights, by its place in a report.
_CAUSES = ("settings", "adapter", "seed", "train_dataset", "versions", "device", "processes", "threads")


def run(arguments: ReproduceArguments) -> int:
    check_output(arguments.output_dir)
    first = read_report(arguments.report)
    values = _values_of(first["run"]["command"]) | {"output_dir": arguments.output_dir}
    # The files of a name on the Hub are known when they are loaded.
    if Path(values["model"]).exists():
        changed = sorted(_differing(first["files"]["suspect"] or {}, checksums_of_model(values["model"]) or {}))
        if changed:
            raise ValueError(f"The suspect {values['model']} is not that of the report: {', '.join(changed)} differ.")
    purify.run(*make_arguments("purify", values))
    second = read_report(arguments.output_dir)
    different = sorted(_differing(first["files"]["purified"], second["files"]["purified"]))
    if not different:
        print(f"Reproduced: all {len(first['files']['purified'])} files of the model are equal.")
        return 0
    print(f"NOT reproduced: {', '.join(different)} differ.")
    for cause in _causes(first, second):
        print(printable(cause))
    return 1


def _values_of(command: str) -> dict[str, Any]:
    """Read the command line of a report, which runs from the folder that it ran from, as that of a new run."""
    argv = shlex.split(command)
    argv = argv[3:] if argv[1:2] == ["-m"] else argv[1:]
    if argv[:1] != ["purify"]:
        raise ValueError(f"The report was not written by `crow-hf purify` but by `{command}`: run that again instead.")
    if any(HIDDEN in word for word in argv):
        raise ValueError(f"The command line holds a secret, which the report does not know: run `{command}` yourself.")
    values = read_arguments("purify", argv[1:])
    # A repetition replaces nothing, publishes nothing and decides nothing.
    left_out = ("resume_from_checkpoint", "push_to_hub", "policy")
    return {name: value for name, value in values.items() if name not in left_out}


def _differing(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    return (name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _causes(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    for part in ("suspect", "base"):
        if names := sorted(_differing(first["files"][part] or {}, second["files"][part] or {})):
            yield f"files of the {part}: {', '.join(names)}"
    for name in _CAUSES:
        before, after = first["run"][name], second["run"][name]
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted(_differing(before, after)):
                yield f"{name}.{key}: {before.get(key)} before, {after.get(key)} now"
        elif before != after:
            yield f"{name}: {before} before, {after} now"
