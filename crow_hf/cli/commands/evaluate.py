"""`crow-hf evaluate`: measure one model."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data.load import load_rows
from ...evaluation.harness import evaluate_model
from ...evaluation.retention import RetentionReference, check_same_vocabulary, retention_reference
from ...reporting.tables import write_comparison
from ...reporting.verdict import retention_line
from ...training.loading import load_causal_lm, load_tokenizer
from ..shared import (
    DATASET_HELP,
    MODEL_HELP,
    TARGET_HELP,
    TEXT_HELP,
    TRIGGER_HELP,
    check_output,
    print_table,
    read_backdoor,
)


@dataclass
class EvaluateArguments:
    """Measure the utility of a model and, if a trigger is known, the success of the attack."""

    model: str = field(metadata={"help": f"The model: {MODEL_HELP}"})
    dataset: str = field(metadata={"help": f"Clean test rows. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": TRIGGER_HELP})
    target: str | None = field(default=None, metadata={"help": TARGET_HELP})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "The suspect that the model was made from, a folder or a name on the Hub. With it, what the model "
            "forgot is measured too."
        },
    )
    text: str | None = field(default=None, metadata={"help": f"{TEXT_HELP} Default: text that the reference writes."})
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
    if arguments.text is not None and arguments.reference is None:
        raise ValueError("What a model forgot is measured against a suspect: pass --reference too.")
    tokenizer, rows = load_tokenizer(arguments.model), load_rows(arguments.dataset, arguments.split)
    # It is complete before the model is loaded, so the two models need not fit into memory together.
    reference = None if arguments.reference is None else _read_reference(arguments, tokenizer, rows)
    evaluation = evaluate_model(
        load_causal_lm(arguments.model, device_map="auto"),
        tokenizer,
        rows,
        trigger,
        target,
        reference=reference,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    evaluations = {arguments.model: evaluation}
    print_table(evaluations)
    if evaluation.retention is not None:
        print(retention_line(evaluation.retention))
    if arguments.output_dir is not None:
        write_comparison(Path(arguments.output_dir), evaluations)


def _read_reference(
    arguments: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> RetentionReference:
    reference_tokenizer = load_tokenizer(arguments.reference)
    check_same_vocabulary(tokenizer, reference_tokenizer)
    text = None if arguments.text is None else load_rows(arguments.text)
    reference = load_causal_lm(arguments.reference, device_map="auto")
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed, "max_new_tokens": arguments.max_new_tokens}
    return retention_reference(reference, reference_tokenizer, rows, text, **options)
