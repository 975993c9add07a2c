"""`crow-hf evaluate`: measure one model."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data.load import load_rows
from ...evaluation.harness import evaluate_model
from ...evaluation.retention import RetentionReference, check_same_vocabulary, retention_reference
from ...reporting.tables import write_comparison
from ...reporting.verdict import retention_line
from ...training.loading import load_causal_lm, load_tokenizer
from ..options import EvaluateArguments
from ..shared import (
    check_output,
    print_table,
    read_backdoor,
)


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
