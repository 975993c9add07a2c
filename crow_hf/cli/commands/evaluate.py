"""`crow-hf evaluate`: measure one model."""

from pathlib import Path
from typing import Any

from ...attacks.targets import BaseTarget
from ...attacks.triggers import BaseTrigger
from ...data.load import load_rows
from ...evaluation.endpoint import Endpoint
from ...evaluation.harness import Evaluation, evaluate_endpoint, evaluate_model
from ...evaluation.retention import check_same_vocabulary, retention_reference
from ...evaluation.tasks import TaskScore, evaluate_tasks, load_tasks
from ...reporting.tables import write_comparison
from ...reporting.verdict import retention_line
from ...training.loading import load_causal_lm, load_tokenizer
from ...training.quantization import quantized
from ..arguments import split_names
from ..options import EvaluateArguments
from ..shared import check_output, print_table, print_task_table, read_backdoor


def run(arguments: EvaluateArguments) -> None:
    if arguments.output_dir is not None:
        check_output(arguments.output_dir)
    trigger, target = read_backdoor(arguments.trigger, arguments.target, arguments.judge, arguments.judge_question)
    if arguments.text is not None and arguments.reference is None:
        raise ValueError("What a model forgot is measured against a suspect: pass --reference too.")
    if arguments.tasks is None and (arguments.task_folder is not None or arguments.task_limit is not None):
        raise ValueError("No task is run: pass their names as --tasks too.")
    if arguments.task_limit is not None and arguments.task_limit < 1:
        raise ValueError(f"--task_limit is a number of rows, at least 1, got {arguments.task_limit}.")
    scores: dict[str, list[TaskScore]] = {}
    if arguments.endpoint is None:
        evaluation = _evaluate_model(arguments, trigger, target, scores)
    else:
        evaluation = _evaluate_endpoint(arguments, trigger, target)
    evaluations = {arguments.model: evaluation}
    print_table(evaluations)
    if evaluation.retention is not None:
        print(retention_line(evaluation.retention))
    if scores:
        print_task_table(scores)
    if arguments.output_dir is not None:
        write_comparison(Path(arguments.output_dir), evaluations, scores)


def _evaluate_model(
    arguments: EvaluateArguments,
    trigger: BaseTrigger | None,
    target: BaseTarget | None,
    scores: dict[str, list[TaskScore]],
) -> Evaluation:
    """Measure the model, and add the scores of tasks, those of the reference first."""
    tokenizer, rows = load_tokenizer(arguments.model), load_rows(arguments.dataset, arguments.split)
    form, tasks = quantized(arguments.quantization), None
    if arguments.tasks is not None:
        tasks = load_tasks(split_names(arguments.tasks), arguments.task_folder)
    options: dict[str, Any] = {"batch_size": arguments.batch_size}
    reference = None
    if arguments.reference is not None:
        reference_tokenizer = load_tokenizer(arguments.reference)
        check_same_vocabulary(tokenizer, reference_tokenizer)
        text = None if arguments.text is None else load_rows(arguments.text)
        suspect = load_causal_lm(arguments.reference, device_map="auto")
        lengths = {"seed": arguments.seed, "max_new_tokens": arguments.max_new_tokens}
        reference = retention_reference(suspect, reference_tokenizer, rows, text, **lengths, **options)
        if tasks is not None:
            scores[arguments.reference] = evaluate_tasks(
                suspect, reference_tokenizer, tasks, limit=arguments.task_limit, **options
            )
        # The two models need not fit into memory together.
        del suspect
    model = load_causal_lm(arguments.model, device_map="auto", **form)
    evaluation = evaluate_model(
        model,
        tokenizer,
        rows,
        trigger,
        target,
        reference=reference,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        **options,
    )
    if tasks is not None:
        scores[arguments.model] = evaluate_tasks(model, tokenizer, tasks, limit=arguments.task_limit, **options)
    return evaluation


def _evaluate_endpoint(
    arguments: EvaluateArguments, trigger: BaseTrigger | None, target: BaseTarget | None
) -> Evaluation:
    if arguments.reference is not None or arguments.tasks is not None:
        raise ValueError(
            "What a model forgot, and tasks, take logits, which an endpoint does not give: leave out --reference and "
            "--tasks."
        )
    if arguments.quantization is not None:
        raise ValueError("The server decides how its weights are quantized: leave out --quantization.")
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
