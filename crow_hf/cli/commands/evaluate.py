"""`crow-hf evaluate`: measure one model."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...attacks.targets import BaseTarget
from ...attacks.triggers import BaseTrigger
from ...data.load import load_rows
from ...evaluation.endpoint import Endpoint
from ...evaluation.harness import Evaluation, evaluate_endpoint, evaluate_model
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
    trigger, target = read_backdoor(arguments.trigger, arguments.target, arguments.judge, arguments.judge_question)
    if arguments.text is not None and arguments.reference is None:
        raise ValueError("What a model forgot is measured against a suspect: pass --reference too.")
    evaluate = _evaluate_model if arguments.endpoint is None else _evaluate_endpoint
    evaluation = evaluate(arguments, trigger, target)
    evaluations = {arguments.model: evaluation}
    print_table(evaluations)
    if evaluation.retention is not None:
        print(retention_line(evaluation.retention))
    if arguments.output_dir is not None:
        write_comparison(Path(arguments.output_dir), evaluations)


def _evaluate_model(
    arguments: EvaluateArguments, trigger: BaseTrigger | None, target: BaseTarget | None
) -> Evaluation:
    tokenizer, rows = load_tokenizer(arguments.model), load_rows(arguments.dataset, arguments.split)
    # It is complete before the model is loaded, so the two models need not fit into memory together.
    reference = None if arguments.reference is None else _read_reference(arguments, tokenizer, rows)
    return evaluate_model(
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


def _evaluate_endpoint(
    arguments: EvaluateArguments, trigger: BaseTrigger | None, target: BaseTarget | None
) -> Evaluation:
    if arguments.reference is not None:
        raise ValueError("What a model forgot takes logits, which an endpoint does not give: leave out --reference.")
    evaluation = evaluate_endpoint(
        Endpoint(arguments.endpoint, arguments.model, arguments.batch_size),
        load_rows(arguments.dataset, arguments.split),
        trigger,
        target,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    print("An endpoint gives no logits, so bits per byte and what the model forgot are not measured.")
    return evaluation


def _read_reference(
    arguments: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> RetentionReference:
    reference_tokenizer = load_tokenizer(arguments.reference)
    check_same_vocabulary(tokenizer, reference_tokenizer)
    text = None if arguments.text is None else load_rows(arguments.text)
    reference = load_causal_lm(arguments.reference, device_map="auto")
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed, "max_new_tokens": arguments.max_new_tokens}
    return retention_reference(reference, reference_tokenizer, rows, text, **options)
