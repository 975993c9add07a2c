"""`doctor()`: finds what would spoil a purification before it starts, and suggests a remedy for each problem."""

import json
import math
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import CrowDataCollator
from ..data.encoding import check_ids, columns_of, padding_id, prepare_dataset
from ..data.rows import add_empty_answers, find_format, render
from ..data.template import read_templates
from ..evaluation.generation import text_of_ids
from ..methods.crow.config import CrowConfig
from ..methods.crow.objective import crow_terms
from ..methods.invariance.config import InvarianceConfig, with_learning_rate
from ..models.byte_vocabulary import BYTE_OFFSET
from ..models.modeling_coconut import CoconutForCausalLM
from ..models.tokenization_coconut import CoconutTokenizer
from ..training.foreign import foreign_generation, settings_set_aside
from ..training.loading import PICKLES, load_causal_lm, load_tokenizer, move
from ..training.recorder import LayerRecorder, base_model_of, context_length, embedding_table, evaluating, recorder_of
from ..training.saves import one_line
from ..training.sharding import is_finite, will_shard
from ..training.trial import place, try_out
from .findings import Finding, Level, has_problem
from .forecast import forecast
from .patch_checkup import PROSE, check_components, check_frozen_predictor, check_patches
from .presets import MAX_ROWS, recipe_config
from .run import default_adapter


# Fewer rows are a warning.
FEW_ROWS = 50
# A larger share of weights that an update leaves unchanged is a warning.
MAX_LOST_UPDATES = 0.1
# Findings in a chat template that are shown.
MAX_SHOWN = 5
# Sizes of the samples: rows, rows and tokens per row for a forward pass, values per weight tensor.
_MAX_ROWS, _MAX_TRIED_ROWS, _MAX_TOKENS, _MAX_VALUES = 1_000, 16, 64, 10_000

# A check yields its findings. Its result is what later checks need, or `None` if they cannot run.
_T = TypeVar("_T")
_Check = Generator[Finding, None, _T | None]


def doctor(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    recipe: str = "strong",
    learning_rate: float | None = None,
    max_length: int = 1024,
) -> list[Finding]:
    """
    Look for problems that would spoil a purification.

    Nothing is trained, changed or written, and no remote code of the model is run.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Any causal LM. A path or a name is loaded in float32, as [`CrowTrainer`] does.
        dataset (`Dataset` or `IterableDataset`, *optional*):
            The clean rows. The first 1,000 are checked. Without rows, the model is checked on an English text.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Defaults to the one that was saved with the model.
        recipe (`str`, *optional*, defaults to `"strong"`):
            The recipe of the purification. With rows, the last finding is about how much memory, disk and time it
            takes.
        learning_rate (`float`, *optional*):
            Learning rate of the purification. Defaults to that of the recipe.
        max_length (`int`, *optional*, defaults to 1024):
            Maximum length of a row of the purification, in tokens.

    Returns:
        `list[Finding]`: The findings in the order of the checks. Checks that are impossible because of an earlier
        problem are missing.

    Example:

    ```python
    >>> for finding in doctor("suspect", clean_rows):
    ...     print(finding.level, finding.name, finding.found, finding.remedy)
    ```
    """
    changes: dict[str, Any] = {} if learning_rate is None else {"learning_rate": learning_rate}
    args = recipe_config(recipe, "purified", max_length=max_length, **changes)
    device = None if isinstance(model, (str, Path)) else model.device
    try:
        return list(_findings(model, dataset, processing_class, recipe, args))
    finally:
        if not isinstance(model, (str, Path)) and model.device != device:
            move(model, device)


def _findings(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: str,
    args: CrowConfig,
) -> Iterator[Finding]:
    path = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
    if isinstance(model, (str, Path)):
        model = yield from _load(model)
        if model is None:
            return
    recorder = yield from _check_model(model, args)
    if recorder is None:
        return
    encoded = yield from _check_data(model, path, dataset, tokenizer, args.max_length)
    if encoded is None:
        return
    rows, tokenizer = encoded
    if isinstance(recorder.base, CoconutForCausalLM):
        documents = [] if dataset is None else [_bytes_of(row["input_ids"]) for row in rows]
        yield from check_patches(recorder.base, documents)
    yield from _check_objective(recorder, model, rows, tokenizer, args)
    if dataset is not None and tokenizer is not None:
        yield from _check_cost(model, dataset, recipe, args, tokenizer)


# The model


def _load(path: str | Path) -> _Check[PreTrainedModel | PeftModel]:
    if Path(path).is_dir():
        findings = list(check_files(Path(path)))
        yield from findings
        if has_problem(findings):
            return None
    try:
        return load_causal_lm(path, is_trainable=True)
    except (ValueError, OSError) as error:
        yield Finding("loading", "problem", _in_one_line(error), "Fix this first. The other checks need the model.")
        return None


def check_files(folder: Path) -> Iterator[Finding]:
    """Check the files of a model before any of them is loaded."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not any(file.suffix in (".safetensors", ".gguf") for file in folder.iterdir()):
        if pickles:
            found = f"The folder has no safetensors, only pickles: {', '.join(pickles)}."
            remedy = "Convert them to safetensors on an isolated machine, because loading a pickle runs code."
        else:
            found, remedy = "The folder has no weights.", "Download or save the model again."
        yield Finding("files", "problem", found, remedy)
    elif pickles:
        remedy = "Delete them. Nothing here loads them, but another program may, and loading a pickle runs code."
        yield Finding("files", "warning", f"The folder also has pickles: {', '.join(pickles)}.", remedy)
    else:
        yield Finding("files", "ok", "The weights are safetensors or GGUF, and there are no pickles.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # An adapter has no such file. If the file is broken, loading the model says so.
        return
    yield _check_remote_code(config)


def _check_remote_code(config: dict) -> Finding:
    if not isinstance(config, dict):
        found = f"The config.json holds a {type(config).__name__} instead of settings."
        return Finding("remote code", "problem", found, "Download the model again, or mend the file.")
    if not config.get("auto_map"):
        return Finding("remote code", "ok", "The model has no remote code.")
    if config.get("model_type") in CONFIG_MAPPING:
        found = "The model has remote code, but it is not run, because an installed package has the architecture."
        return Finding("remote code", "ok", found)
    named = config["auto_map"]
    names = ", ".join(sorted(map(str, named.values()))) if isinstance(named, dict) else str(named)
    return Finding(
        "remote code",
        "problem",
        f"The model needs remote code ({names}), which can do anything on this machine.",
        "Install the package that has the architecture. Or read the code, load the model yourself and pass it.",
    )


def _check_model(model: PreTrainedModel | PeftModel, args: CrowConfig) -> _Check[LayerRecorder]:
    base = base_model_of(model)
    if type(base).__module__.startswith("transformers_modules"):
        found = f"{type(base).__name__} is remote code that came with the model, and it runs in this process."
        remedy = "Load the model without `trust_remote_code`, with the package that has the architecture."
        yield Finding("remote code", "warning", found, remedy)
    if isinstance(base, CoconutForCausalLM):
        finding = check_components(base)
        yield finding
        if finding.level == "problem":
            return None
    try:
        recorder = recorder_of(model)
    except ValueError as error:
        yield Finding("layers", "problem", str(error), "Use a decoder-only causal LM of transformers.")
        return None
    pairs = len(recorder.layers) - 1
    found = f"{recorder.name} has {pairs + 1} layers. CROW compares {pairs} pairs of consecutive layers."
    yield Finding("layers", "ok", found)
    findings = list(_check_weights(model, with_learning_rate(args, model).learning_rate))
    yield from findings
    yield from check_frozen_predictor(model)
    if has_problem(findings):
        return None
    try:
        place(model, args)
        if not will_shard(args):
            try_out(recorder)
    except torch.OutOfMemoryError:
        found = f"The model does not fit into the memory of {args.device}."
        yield Finding("objective", "problem", found, "Use a machine with more memory, or a smaller model.")
        return None
    except ValueError as error:
        yield Finding("objective", "problem", str(error), "Use another model, or download this one again.")
        return None
    return recorder


def _check_weights(model: PreTrainedModel | PeftModel, learning_rate: float) -> Iterator[Finding]:
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        found = "The model contains an adapter that training would not find."
        yield Finding("adapter", "problem", found, "Load it with `load_causal_lm`, which returns a `PeftModel`.")
        return
    if bad := [name for name, weight in model.named_parameters() if not is_finite(weight)]:
        found = f"{len(bad)} of the model's tensors contain NaN or infinity, such as `{bad[0]}`."
        yield Finding("weights", "problem", found, "Download the model again, or use an earlier checkpoint.")
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable:
        remedy = "Load the adapter with `is_trainable=True`, or pass `peft_config` to train a fresh LoRA."
        yield Finding("weights", "problem", "No weight is trainable.", remedy)
        return
    yield _check_precision(trainable, learning_rate)


def _check_precision(weights: list[torch.nn.Parameter], learning_rate: float) -> Finding:
    """Check that the weights can hold an update of Adam, whose size is about the learning rate."""
    samples = [weight.detach().flatten()[:: max(1, weight.numel() // _MAX_VALUES)] for weight in weights]
    unchanged = sum((values + learning_rate == values).sum().item() for values in samples)
    share = unchanged / sum(map(len, samples))
    dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}))
    found = (
        f"The trainable weights are in {dtypes}. An update of {learning_rate:g} leaves {share:.0%} of them unchanged."
    )
    if share > MAX_LOST_UPDATES:
        remedy = "Load the model in float32 and train with `bf16=True`, or raise the learning rate."
        return Finding("precision", "warning", found, remedy)
    return Finding("precision", "ok", found)


# Tokenizer and rows


def _check_data(
    model: PreTrainedModel | PeftModel,
    path: str,
    dataset: Dataset | IterableDataset | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
) -> _Check[tuple[Dataset, PreTrainedTokenizerBase | None]]:
    base = base_model_of(model)
    tokenizer, finding = _find_tokenizer(tokenizer, path, dataset, isinstance(base, CoconutForCausalLM))
    yield finding
    if finding.level == "problem":
        return None
    yield from check_template(tokenizer)
    yield from check_generation(model, tokenizer)
    if dataset is not None:
        try:
            rows, finding = _check_rows(dataset, tokenizer)
        except ValueError as error:
            yield Finding("rows", "problem", str(error), "Fix the rows. `crow_hf.data` lists the formats.")
            return None
        yield finding
        yield _check_lengths(rows, max_length, context_length(model))
    elif tokenizer is not None:
        rows = prepare_dataset(Dataset.from_dict({"text": [PROSE]}), tokenizer, sys.maxsize)
    else:
        return None
    finding = _check_ids(rows, len(embedding_table(base)))
    yield finding
    return None if finding.level == "problem" else (rows, tokenizer)


def check_generation(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Finding]:
    settings = foreign_generation(model, tokenizer)
    remedy = "A purification leaves them out of what it measures, and drops them. Ask why they are there."
    if tokenizer is not None and (ends := settings.pop("eos_token_id", [])):
        # What is no id has no text.
        texts = [repr(text_of_ids([end], tokenizer)) if isinstance(end, int) and end >= 0 else "no id" for end in ends]
        words = ", ".join(f"{end} ({text})" for end, text in zip(ends[:MAX_SHOWN], texts, strict=False))
        found = f"Tokens that are no special tokens end answers: {words}. What follows them would never be seen."
        yield Finding("end tokens", "warning", found, remedy)
    if settings:
        found = f"The settings of generation can choose the words of answers: {', '.join(settings)}."
        yield Finding("generation", "warning", found, remedy)
    if names := settings_set_aside(model):
        found = f"The config names implementations, which are not used: {', '.join(names)}."
        yield Finding("implementations", "warning", found, "If you trust one, choose it by `model_init_kwargs`.")


def _find_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None,
    path: str,
    dataset: Dataset | IterableDataset | None,
    is_coconut: bool,
) -> tuple[PreTrainedTokenizerBase | None, Finding]:
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(path)
        except (ValueError, OSError) as error:
            found = _in_one_line(error)
            if is_coconut:
                remedy = "The other checks use `CoconutTokenizer()`. Pass it, and save it with the model."
                return CoconutTokenizer(), Finding("tokenizer", "warning", found, remedy)
            if dataset is not None and "input_ids" in columns_of(dataset, "dataset"):
                return None, Finding("tokenizer", "ok", "The rows are token ids and need no tokenizer.")
            level: Level = "warning" if dataset is None else "problem"
            return None, Finding("tokenizer", level, found, "Pass the model's tokenizer as `processing_class`.")
    if tokenizer.eos_token_id is None:
        found = "The tokenizer has no end token, so the rows do not teach the model where to stop."
        remedy = "Set `tokenizer.eos_token` to the token at which the model stops."
        return tokenizer, Finding("tokenizer", "warning", found, remedy)
    found = f"The tokenizer has {len(tokenizer)} tokens and an end token."
    if tokenizer.pad_token_id is None:
        found += " It has no pad token and needs none, because padding is masked."
    return tokenizer, Finding("tokenizer", "ok", found)


def check_template(tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Finding]:
    """Read the chat template, which can act on prompts beside the weights."""
    if tokenizer is None or not tokenizer.chat_template:
        return
    found = read_templates(tokenizer)
    if warnings := [str(each) for each in found if not each.is_note]:
        remedy = "Read the template: no purification removes what it does. Or take that of a model you trust."
        yield Finding("chat template", "warning", " ".join(warnings[:MAX_SHOWN]), remedy)
    else:
        said = ["The chat template arranges messages.", *map(str, found[:MAX_SHOWN])]
        yield Finding("chat template", "ok", " ".join(said))


def _check_rows(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Dataset, Finding]:
    """Encode the first rows, and check that they are enough."""
    columns = columns_of(dataset, "dataset")
    sample: Dataset | IterableDataset = dataset.take(_MAX_ROWS)
    if isinstance(sample, IterableDataset):
        sample = Dataset.from_list(list(sample))
    answered = add_empty_answers(sample)
    if answered.column_names != sample.column_names and tokenizer is not None:
        prompts = [render(row, tokenizer, index).prompt for index, row in enumerate(answered)]
        rows = prepare_dataset(Dataset.from_dict({"text": prompts}), tokenizer, sys.maxsize, "dataset")
        found = f"The first {len(sample)} rows are prompts without an answer, which only the recipe strong takes."
        return rows, Finding("rows", "warning", found, "Use the recipe strong, or add answers.")
    row_format = find_format(columns, "the dataset")
    rows = prepare_dataset(sample, tokenizer, sys.maxsize, "dataset")
    found = f"{len(rows)} of the first {len(sample)} rows can be used. Their format is {row_format!r}."
    if len(rows) < len(sample):
        return rows, Finding("rows", "warning", found, "Fill the empty answers, or drop these rows.")
    if len(rows) < FEW_ROWS:
        return rows, Finding("rows", "warning", found, "Pass about 100 clean rows. More different rows help.")
    if row_format in ("text", "tokens"):
        found += " They have no prompts, which the recipe strong needs."
        return rows, Finding("rows", "warning", found, "Pass rows with prompts, or use the recipe guide or paper.")
    return rows, Finding("rows", "ok", found)


def _check_lengths(rows: Dataset, max_length: int, context: int | None) -> Finding:
    limit = min(max_length, context or max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    too_long = sum(length > limit for length in lengths)
    found = f"{too_long} of {len(lengths)} rows are longer than {limit} tokens. The longest has {max(lengths)}."
    if not too_long:
        return Finding("context", "ok", found)
    if limit == max_length and limit != context:
        remedy = "Raise `max_length`, or the ends of these rows are not used."
    else:
        remedy = "Split these rows, or their ends are not used. The model's context is no longer."
    return Finding("context", "warning", found, remedy)


def _check_ids(rows: Dataset, num_embeddings: int) -> Finding:
    try:
        highest = check_ids([*rows["input_ids"], *rows["labels"]], num_embeddings)
    except ValueError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding("vocabulary", "problem", f"{found}.", remedy)
    found = f"The highest token id is {highest}, and the model has {num_embeddings} embeddings."
    return Finding("vocabulary", "ok", found)


def _bytes_of(ids: list[int]) -> bytes:
    return bytes(index - BYTE_OFFSET for index in ids if BYTE_OFFSET <= index < BYTE_OFFSET + 256)


# The objective


def _check_objective(
    recorder: LayerRecorder,
    model: PreTrainedModel | PeftModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    args: CrowConfig,
) -> Iterator[Finding]:
    """Run both passes of CROW on the first tokens of a few rows, without an optimizer step."""
    sample = rows.shuffle(seed=args.seed).take(min(_MAX_TRIED_ROWS, len(rows)))
    ids = [row["input_ids"][:_MAX_TOKENS] for row in sample]
    epsilon, mode = args.epsilon, args.epsilon_mode
    if isinstance(args, InvarianceConfig):
        epsilon, mode = args.adversarial_step_size, "relative"
    batch = CrowDataCollator(padding_id(tokenizer))([{"input_ids": row, "labels": row} for row in ids])
    try:
        with evaluating(model), torch.no_grad():
            inputs = recorder.prepare({name: value.to(model.device) for name, value in batch.items()})
            options: dict[str, Any] = {"epsilon": epsilon, "epsilon_mode": mode, "layers": args.consistency_layers}
            _, terms = crow_terms(recorder, model, model, inputs, **options)
    except Exception as error:  # Models and adapters fail on rows in ways of their own.
        remedy = "Use another model, or rows that this model accepts."
        yield Finding("objective", "problem", one_line(error), remedy)
        return
    values = {name: value.item() for name, value in terms.items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        found = f"`{bad[0]}` is {values[bad[0]]} on some of the rows in {str(model.dtype).removeprefix('torch.')}."
        yield Finding("objective", "problem", found, "Load the model in float32.")
        return
    yield _judge_perturbation(values, epsilon, mode)
    yield _judge_loss(values["loss_lm"], math.log(embedding_table(recorder.base).shape[0]))


def _judge_perturbation(values: dict[str, float], epsilon: float, mode: str) -> Finding:
    found = (
        f"Both passes work. Consecutive layers differ by {values['consistency_clean']:.2g} (1 - cos), and by "
        f"{values['consistency_perturbed']:.2g} with a perturbation. Its step of {epsilon:g} ({mode}) is "
        f"{values['perturbation_ratio']:.2g} times the length of the embeddings."
    )
    if values["perturbation_ratio"] > 1:
        found += " The perturbation drowns them."
        return Finding("objective", "warning", found, "Pass epsilon_mode='relative'.")
    return Finding("objective", "ok", found)


def _judge_loss(loss: float, guessing: float) -> Finding:
    found = f"The loss on some of the rows is {loss:.2f} nats per token. Guessing gives {guessing:.2f}."
    if loss >= guessing:
        remedy = "Train the model first, or check that the tokenizer and the rows belong to this model."
        return Finding("language model", "warning", found, remedy)
    return Finding("language model", "ok", found)


def _check_cost(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    recipe: str,
    args: CrowConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Finding]:
    """Forecast what the purification takes. Nothing is said of a model that only the recipe's own checks explain."""
    drawn = dataset.take(MAX_ROWS[recipe])
    try:
        found = forecast(model, drawn, args, tokenizer, adapter=default_adapter(recipe, model, args))
    except ValueError as error:
        yield Finding("cost", "problem", str(error), "Mend this first, or use a machine with more memory.")
    else:
        remedy = "" if found.fits else "Lower `per_device_train_batch_size`, or free memory or disk."
        yield Finding("cost", "ok" if found.fits else "warning", str(found), remedy)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
