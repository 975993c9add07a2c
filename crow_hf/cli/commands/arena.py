"""`crow-hf arena`: run every defence on every attack."""

import re

from ...arena.attacks import ATTACKS, QUICK
from ...arena.defences import METHODS, QUICK_METHODS
from ...arena.run import run_arena
from ...arena.subjects import SUBJECTS
from ..options import ArenaArguments


def run(arguments: ArenaArguments) -> None:
    ready = [name for name, attack in ATTACKS.items() if arguments.alpaca or not SUBJECTS[attack.subject].is_alpaca]
    seeds = _names(arguments.seeds) or (["0"] if arguments.quick else ["0", "1", "2"])
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise ValueError(f"--seeds are whole numbers separated by commas, got {wrong[0]!r}.")
    rows = run_arena(
        arguments.output_dir,
        _names(arguments.attacks) or (QUICK if arguments.quick else ready),
        _names(arguments.methods) or (QUICK_METHODS if arguments.quick else list(METHODS)),
        [int(seed) for seed in seeds],
        num_clean=arguments.num_clean,
        alpaca=arguments.alpaca,
        workers=arguments.workers,
    )
    print(f"{len(rows)} runs. The tables are in {arguments.output_dir}/results.md.")
    if failed := sum("error" in row for row in rows):
        raise ValueError(
            f"{failed} of the runs failed, see the end of results.md. Run the same command again to repeat them."
        )


def _names(text: str | None) -> list[str]:
    """Split names at commas. A comma before a space is part of a name."""
    return [] if text is None else re.split(r",(?! )", text)
