"""`crow-hf patch`: show how a text is cut into patches, or patch a dataset."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data.load import load_rows
from ...data.visible import printable
from ...files import check_regular, whole_files
from ...patching.calibration import calibrate_threshold
from ...patching.patcher import EntropyPatcher, load_entropy_predictor
from ...patching.view import describe_rule, render_terminal, summarize, write_html
from ..options import PatchArguments
from ..shared import check_output


def run(arguments: PatchArguments) -> None:
    _check(arguments)
    predictor = load_entropy_predictor(arguments.predictor)
    source = _read_source(arguments)
    settings: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("rule", "max_patch_length", "column", "threshold", "relative_threshold", "unit")
    }
    if arguments.target_patch_size is not None:
        found = calibrate_threshold(source, predictor, arguments.target_patch_size, **settings)
        settings |= {"threshold": found.threshold, "relative_threshold": found.relative_threshold, "unit": "share"}
        print(f"Calibrated: {found.patch_size:.2f} bytes per patch on {found.num_bytes} bytes.")
    patcher = EntropyPatcher(predictor, **settings)
    if arguments.dataset is not None:
        options = {"batched": True, "remove_columns": source.column_names, "num_proc": arguments.num_proc}
        patched = source.map(patcher, desc="Patching", **options)
        with whole_files(arguments.output_dir) as folder:
            patched.save_to_disk(folder)
        print(printable(f"The patched dataset is in {arguments.output_dir}."))
        return
    document = patcher.patch(source)[0]
    Console().print(render_terminal(document))
    print(summarize(document))
    print(describe_rule(document, patcher.rule))
    if arguments.html is not None:
        write_html(document, arguments.html, title=arguments.file or "Entropy patches")
        print(printable(f"The page is {arguments.html}."))


def _check(arguments: PatchArguments) -> None:
    given = [name for name in ("text", "file", "dataset") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError("Pass one of --text, --file and --dataset.")
    if (arguments.dataset is None) != (arguments.output_dir is None):
        raise ValueError(
            "--dataset and --output_dir belong together: a text or a file is shown, a dataset is written."
        )
    if arguments.dataset is not None and arguments.html is not None:
        raise ValueError("--html shows one text: pass --text or --file instead of --dataset.")
    if arguments.html is not None and Path(arguments.html).exists():
        raise ValueError(f"{arguments.html} exists already: choose another --html.")
    if arguments.output_dir is not None:
        check_output(arguments.output_dir)


def _read_source(arguments: PatchArguments) -> Any:
    """Read the dataset, or the one document to show."""
    if arguments.dataset is not None:
        rows = load_rows(arguments.dataset, arguments.split).with_format(None)
        if not len(rows):
            raise ValueError(f"{arguments.dataset} is empty: pass at least one row.")
        return rows
    if arguments.file is not None:
        check_regular(arguments.file)
        with open(arguments.file, "rb") as file:
            return [file.read(arguments.max_bytes)]
    return [os.fsencode(arguments.text)]
