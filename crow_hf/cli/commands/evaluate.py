"""`crow-hf evaluate`: measure one model."""

from dataclasses import dataclass, field
from pathlib import Path

from ...data.load import load_rows
from ...evaluation.harness import evaluate_model
from ...reporting.tables import write_comparison
from ...training.loading import load_causal_lm, load_tokenizer
from ..shared import DATASET_HELP, MODEL_HELP, TARGET_HELP, TRIGGER_HELP, check_output, print_table, read_backdoor


@dataclass
class EvaluateArguments:
    """Measure the utility of a model and, if a trigger is known, the success of the attack."""

    model: str = field(metadata={"help": f"The model: {MODEL_HELP}"})
    dataset: str = field(metadata={"help": f"Clean test rows. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": TRIGGER_HELP})
    target: str | None = field(default=None, metadata={"help": TARGET_HELP})
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})
    batch_size: int = field(default=32, metadata={"help": "Number of prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed for the positions of the trigger."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and results.md. It must be new or empty."}
    )


ARGUMENTS = [EvaluateArguments]


def run(arguments: EvaluateArguments) -> None:
    if arguments.output_dir is not None:
        check_output(arguments.output_dir)
    trigger, target = read_backdoor(arguments.trigger, arguments.target)
    evaluation = evaluate_model(
        load_causal_lm(arguments.model, device_map="auto"),
        load_tokenizer(arguments.model),
        load_rows(arguments.dataset, arguments.split),
        trigger,
        target,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    evaluations = {arguments.model: evaluation}
    print_table(evaluations)
    if arguments.output_dir is not None:
        write_comparison(Path(arguments.output_dir), evaluations)
