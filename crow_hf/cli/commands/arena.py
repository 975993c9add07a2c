"""`crow-hf arena`: run every defence on every attack."""

from ...arena.attacks import ATTACKS, PAPER, QUICK
from ...arena.defences import PAPER_METHODS, QUICK_METHODS, known_methods
from ...arena.run import run_arena
from ...arena.subjects import SUBJECTS
from ...data.visible import printable
from ...methods.registry import load_defences
from ..arguments import split_names
from ..options import ArenaArguments


def run(arguments: ArenaArguments) -> None:
    if arguments.plugin is not None:
        load_defences(arguments.plugin)
    ready = [name for name, attack in ATTACKS.items() if arguments.alpaca or not SUBJECTS[attack.subject].is_alpaca]
    seeds = split_names(arguments.seeds) or (["0"] if arguments.quick else ["0", "1", "2"])
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise ValueError(f"--seeds are whole numbers separated by commas, got {wrong[0]!r}.")
    attacks, methods = ready, list(known_methods())
    if arguments.paper:
        attacks, methods = list(PAPER), list(PAPER_METHODS)
    elif arguments.quick:
        attacks, methods = list(QUICK), list(QUICK_METHODS)
    rows = run_arena(
        arguments.output_dir,
        split_names(arguments.attacks) or attacks,
        split_names(arguments.methods) or methods,
        [int(seed) for seed in seeds],
        num_clean=arguments.num_clean,
        alpaca=arguments.alpaca,
        workers=arguments.workers,
    )
    print(printable(f"{len(rows)} runs. The tables are in {arguments.output_dir}/results.md."))
    if failed := sum("error" in row for row in rows):
        raise ValueError(
            f"{failed} of the runs failed, see the end of results.md. Run the same command again to repeat them."
        )
