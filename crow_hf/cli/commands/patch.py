"""`crow-hf patch`: show how a text is cut into patches, or patch a dataset."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data.load import load_rows
from ...models.boundaries import RULES
from ...patching.calibration import calibrate_threshold
from ...patching.patcher import EntropyPatcher, load_entropy_predictor
from ...patching.view import render_terminal, summarize, write_html
from ..shared import DATASET_HELP, check_output


@dataclass
class PatchArguments:
    """Cut text or bytes into patches: show one text with its entropies, or write a dataset of patches."""

    text: str | None = field(default=None, metadata={"help": "The text to show."})
    file: str | None = field(default=None, metadata={"help": "The file to show, text or any other bytes."})
    dataset: str | None = field(default=None, metadata={"help": f"The dataset to patch. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    column: str | None = field(default=None, metadata={"help": "Column of the dataset with the text or the bytes."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the patched dataset. It must be new or empty."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that patch the dataset."})
    html: str | None = field(default=None, metadata={"help": "File for the view of a text or file as a web page."})
    max_bytes: int = field(default=10_000, metadata={"help": "Number of bytes of a file to show."})
    predictor: str | None = field(
        default=None,
        metadata={"help": "A ByteEntropyPredictor: a folder or a name on the Hub. Default: the one that ships."},
    )
    rule: str = field(default="either", metadata={"help": f"One of {', '.join(RULES)}."})
    threshold: float | None = field(
        default=None, metadata={"help": "Highest entropy inside a patch, in bits. Default: that of the predictor."}
    )
    relative_threshold: float | None = field(
        default=None,
        metadata={"help": "Highest rise of the entropy inside a patch, in bits. Default: that of the predictor."},
    )
    max_patch_length: int | None = field(
        default=None, metadata={"help": "Longest patch in bytes. It is the stride of the rule stride."}
    )
    target_patch_size: float | None = field(
        default=None, metadata={"help": "Scale both thresholds so that the mean patch has this number of bytes."}
    )


ARGUMENTS = [PatchArguments]


def run(arguments: PatchArguments) -> None:
    _check(arguments)
    predictor = load_entropy_predictor(arguments.predictor)
    source = _read_source(arguments)
    settings: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("rule", "max_patch_length", "column", "threshold", "relative_threshold")
    }
    if arguments.target_patch_size is not None:
        found = calibrate_threshold(source, predictor, arguments.target_patch_size, **settings)
        settings |= {"threshold": found.threshold, "relative_threshold": found.relative_threshold}
        print(
            f"threshold {found.threshold:.4g} bits, relative threshold {found.relative_threshold:.4g} bits: "
            f"{found.patch_size:.2f} bytes per patch on {found.num_bytes} bytes"
        )
    patcher = EntropyPatcher(predictor, **settings)
    if arguments.dataset is not None:
        options = {"batched": True, "remove_columns": source.column_names, "num_proc": arguments.num_proc}
        source.map(patcher, desc="Patching", **options).save_to_disk(arguments.output_dir)
        print(f"The patched dataset is in {arguments.output_dir}.")
        return
    document = patcher.patch(source)[0]
    Console().print(render_terminal(document))
    print(summarize(document))
    if arguments.html is not None:
        write_html(document, arguments.html, title=arguments.file or "Entropy patches")
        print(f"The page is {arguments.html}.")


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
        with open(arguments.file, "rb") as file:
            return [file.read(arguments.max_bytes)]
    return [os.fsencode(arguments.text)]
