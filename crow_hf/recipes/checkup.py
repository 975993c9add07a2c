"""`doctor()`: what would spoil a purification, found before the work, each finding with its remedy."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import CrowDataCollator
from ..data.encoding import columns_of, padding_id, prepare_dataset
from ..data.rows import find_format
from ..methods.crow.objective import crow_terms
from ..models.boundaries import ENOUGH_BYTES, USUAL_PATCH_SIZES
from ..models.byte_vocabulary import BYTE_OFFSET
from ..models.modeling_byte_entropy import NATS_PER_BIT, ByteEntropyPredictor
from ..models.modeling_coconut import CoconutForCausalLM
from ..models.tokenization_coconut import CoconutTokenizer
from ..patching.calibration import calibrate_threshold
from ..patching.patcher import UNTRAINED_BITS, EntropyPatcher
from ..training.loading import PICKLES, load_causal_lm, load_tokenizer
from ..training.recorder import LayerRecorder, context_length, frozen_modules, recorder_of


Level = Literal["ok", "warning", "problem"]

# Below, what is good enough.
FEW_ROWS = 50
MAX_LOST_UPDATES = 0.1
MAX_ONE_BYTE_PATCHES = 0.5
# How much is looked at.
_ROWS, _BYTES, _TOKENS, _WEIGHTS = 1_000, 50_000, 64, 10_000
_PROSE = (
    "The ferry was late again. On the pier a woman in a grey coat counted the gulls aloud, and when she came to thirty she began "
    "anew, as if the number had been wrong. Nobody minded; most of those who waited had seen her there every Friday since the "
    "spring. At last the bell rang from the other shore, the rope was thrown, and the first cars rolled slowly down the ramp.\n"
    "Inside it smelled of coffee and wet wool. A boy read the timetable to his sister, one hour after the other, and she "
    "corrected him whenever he left out a word. It takes forty minutes to cross, unless there is fog.\n"
)
_COMPONENTS = (
    "latent_transformer",
    "latent_transformer.entropy_predictor",
    "latent_transformer.backbone",
    "binary_patch_module",
    "local_encoder",
    "local_decoder",
)


@dataclass(frozen=True)
class Finding:
    """
    What one check of [`doctor`] found.

    Attributes:
        name (`str`):
            What was looked at.
        level (`str`):
            `"ok"`; `"warning"`: it works, but worse than it could; `"problem"`: it does not work, or what comes out is
            wrong.
        found (`str`):
            A sentence.
        remedy (`str`):
            What to do about it; empty if there is nothing to do.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""


def doctor(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    learning_rate: float = 2e-5,
    max_length: int = 1024,
) -> list[Finding]:
    """
    Look for what would spoil a purification. Nothing is trained, changed or written, and no code of the model's own is
    run.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            Any causal LM, or where to load one from, in float32 as [`CrowTrainer`] does.
        dataset (`Dataset` or `IterableDataset`, *optional*):
            The clean rows, of which the first 1,000 are read. Without it an English text stands in for them.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Without it, the one saved with the model.
        learning_rate (`float`, *optional*, defaults to 2e-5):
            Of the purification.
        max_length (`int`, *optional*, defaults to 1024):
            Of the purification: longest row in tokens.

    Returns:
        `list[Finding]`: In the order of the checks. What cannot be checked because of an earlier problem is left out.

    Example:

    ```python
    >>> for finding in doctor("suspect", clean_rows):
    ...     print(finding.level, finding.name, finding.found, finding.remedy)
    ```
    """
    return list(_findings(model, dataset, processing_class, learning_rate, max_length))


def missing_components(model: PreTrainedModel | PeftModel) -> list[str]:
    """Which parts of a byte-latent model this one lacks, by their names on the model."""
    return [name for name in _COMPONENTS if _part(model, name) is None]


def _part(model: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def _findings(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None,
    tokenizer: PreTrainedTokenizerBase | None,
    learning_rate: float,
    max_length: int,
) -> Iterator[Finding]:
    path = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
    if isinstance(model, (str, Path)):
        if Path(model).is_dir():
            files = list(_check_files(Path(model)))
            yield from files
            if _has_problem(files):
                return
        try:
            model = load_causal_lm(model, is_trainable=True)
        except (ValueError, OSError) as error:
            yield Finding("loading", "problem", " ".join(str(error).split()), "Repair that first.")
            return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base).__module__.startswith("transformers_modules"):
        yield Finding(
            "remote code",
            "warning",
            f"{type(base).__name__} is code that came with the model, and it runs in this process.",
            "Load the model without `trust_remote_code`, by the package that the code is from.",
        )

    is_coconut = isinstance(base, CoconutForCausalLM)
    if is_coconut:
        if missing := missing_components(base):
            yield Finding(
                "components",
                "problem",
                f"The model has no `{missing[0]}`.",
                "Build it with `CoconutForCausalLM.from_backbone`, which makes all its parts.",
            )
            return
        yield Finding("components", "ok", "All parts of a byte-latent model are there.")
    try:
        recorder = recorder_of(model)
    except ValueError as error:
        yield Finding("layers", "problem", str(error), "Take a decoder-only causal LM of transformers.")
        return
    pairs = len(recorder.layers) - 1
    yield Finding("layers", "ok", f"{recorder.name} has {pairs + 1} layers: {pairs} pairs are kept in agreement.")
    weights = list(_check_weights(model, learning_rate))
    yield from weights
    yield from _check_patcher(model)
    if _has_problem(weights):
        return

    tokenizer, finding = _find_tokenizer(tokenizer, path, dataset, is_coconut)
    yield finding
    if finding.level == "problem":
        return
    documents = []
    if dataset is not None:
        try:
            rows, finding = _check_rows(dataset, tokenizer)
        except ValueError as error:
            yield Finding("rows", "problem", str(error), "Repair the rows; `crow_hf.data` lists the formats.")
            return
        yield finding
        yield _check_lengths(rows, max_length, context_length(model))
        documents = [_bytes_of(row["input_ids"]) for row in rows]
    elif tokenizer is not None:
        rows = prepare_dataset(Dataset.from_dict({"text": [_PROSE]}), tokenizer, sys.maxsize)
    else:
        return
    finding = _check_ids(rows, tokenizer, base.get_input_embeddings().weight.shape[0])
    yield finding
    if finding.level == "problem":
        return
    if is_coconut:
        yield from _check_patches(base, documents)
    yield from _check_objective(recorder, model, rows, tokenizer)


def _has_problem(findings: list[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def _check_files(folder: Path) -> Iterator[Finding]:
    """The files of a model, before any of them is read as one."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not any(folder.glob("*.safetensors")):
        found = f"There are pickles only ({', '.join(pickles)})" if pickles else "There are no weights in the folder"
        remedy = "Convert them to safetensors on a machine you can lose: a pickle runs code when it is read."
        yield Finding("files", "problem", f"{found}.", remedy if pickles else "Download or save the model again.")
    elif pickles:
        remedy = "Delete them: nothing here reads them, but another program may, and a pickle runs code."
        yield Finding("files", "warning", f"Beside the safetensors there are pickles: {', '.join(pickles)}.", remedy)
    else:
        yield Finding("files", "ok", "The weights are in safetensors, and there are no pickles.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # An adapter has none; what is wrong with a broken one, loading says.
        return
    if not config.get("auto_map"):
        yield Finding("remote code", "ok", "The model brings no code of its own.")
    elif config.get("model_type") in CONFIG_MAPPING:
        yield Finding("remote code", "ok", "The model brings code of its own, which is not run: it is installed here.")
    else:
        names = ", ".join(sorted(map(str, config["auto_map"].values())))
        yield Finding(
            "remote code",
            "problem",
            f"The model needs code of its own ({names}), which may do anything.",
            "Install the package that the architecture is from, or read that code, load the model yourself and pass it.",
        )


def _check_weights(model: PreTrainedModel | PeftModel, learning_rate: float) -> Iterator[Finding]:
    """
    Whether the weights are numbers, can be trained, and can hold an update of Adam, which is about the learning
    rate.
    """
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        remedy = "Load it with `load_causal_lm`, which returns a `PeftModel`."
        yield Finding("adapter", "problem", "The model has an adapter inside that training would not see.", remedy)
        return
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        yield Finding(
            "weights",
            "problem",
            f"{len(bad)} of the model's tensors hold NaN or infinity, `{bad[0]}` for instance.",
            "Download the model again, or take an earlier checkpoint.",
        )
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable:
        remedy = "Load the adapter with `is_trainable=True`, or train a fresh LoRA with `peft_config`."
        yield Finding("weights", "problem", "No weight can be trained.", remedy)
        return
    samples = [weight.detach().flatten()[:: max(1, weight.numel() // _WEIGHTS)] for weight in trainable]
    lost = sum((part + learning_rate == part).sum().item() for part in samples)
    share = lost / sum(map(len, samples))
    dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in trainable}))
    found = (
        f"The weights to be trained are in {dtypes}: an update of {learning_rate:g} leaves {share:.0%} as they are."
    )
    if share > MAX_LOST_UPDATES:
        remedy = "Load the model in float32 and train with `bf16=True`, or raise the learning rate."
        yield Finding("precision", "warning", found, remedy)
    else:
        yield Finding("precision", "ok", found)


def _check_patcher(model: PreTrainedModel | PeftModel) -> Iterator[Finding]:
    """Whether training leaves alone the model that finds the patches, if there is one."""
    pattern = frozen_modules(model)
    if pattern is None:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    patcher = [module for name, module in base.named_modules() if re.fullmatch(pattern, name)]
    if tuned := sum(isinstance(module, BaseTunerLayer) for module in patcher):
        yield Finding(
            "LoRA",
            "problem",
            f"The adapter changes {tuned} layers of the model that finds the patches, so the patches change with it.",
            f"Make it anew with `exclude_modules={pattern!r}`, or pass `peft_config` to `CrowTrainer`, which does that.",
        )
        return
    if isinstance(model, PeftModel):
        yield Finding("LoRA", "ok", "The adapter leaves the model that finds the patches as it is.")
    else:
        linear = sum(isinstance(module, nn.Linear) for module in patcher)
        yield Finding(
            "LoRA",
            "ok",
            f"`CrowTrainer` keeps a LoRA on 'all-linear' off the {linear} linear layers that find the patches.",
            f"With PEFT alone, pass `exclude_modules={pattern!r}`, or it reaches them.",
        )
    if any(weight.requires_grad for module in patcher for weight in module.parameters()):
        yield Finding(
            "frozen parts",
            "warning",
            "The model that finds the patches is not frozen: it gets no gradient, so training in several processes fails.",
            "Call `requires_grad_(False)` on it, in a Coconut `model.latent_transformer.entropy_predictor`.",
        )


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
            found = " ".join(str(error).split())
            if is_coconut:
                remedy = (
                    "Pass `processing_class=CoconutTokenizer()`, with which the rest was checked, and save it too."
                )
                return CoconutTokenizer(), Finding("tokenizer", "warning", found, remedy)
            if dataset is not None and "input_ids" in columns_of(dataset, "dataset"):
                return None, Finding("tokenizer", "ok", "The rows are ids, so none is needed.")
            level = "warning" if dataset is None else "problem"
            return None, Finding("tokenizer", level, found, "Pass the model's tokenizer as `processing_class`.")
    if tokenizer.eos_token_id is None:
        remedy = "Set `tokenizer.eos_token` to the token that the model stops at."
        return tokenizer, Finding("tokenizer", "warning", "Rows will not teach the model where to stop.", remedy)
    filled = "" if tokenizer.pad_token_id is not None else ", and no pad token, which is no harm: padding never counts"
    return tokenizer, Finding("tokenizer", "ok", f"It has {len(tokenizer)} tokens, an end token{filled}.")


def _check_rows(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Dataset, Finding]:
    """The first rows as ids, and whether they are many enough."""
    row_format = find_format(columns_of(dataset, "dataset"), "the dataset")
    sample = dataset.take(_ROWS)
    if isinstance(sample, IterableDataset):
        sample = Dataset.from_list(list(sample))
    rows = prepare_dataset(sample, tokenizer, sys.maxsize, "dataset")
    found = f"{len(rows)} of the first {len(sample)} rows can be learned from; their format is {row_format!r}."
    if len(rows) < len(sample):
        return rows, Finding("rows", "warning", found, "Fill the answers that are empty, or drop those rows.")
    if len(rows) < FEW_ROWS:
        return rows, Finding("rows", "warning", found, "Pass about 100 clean rows; more different ones help.")
    if row_format in ("text", "tokens"):
        found += " They have no prompts, which the recipe strong needs."
        return rows, Finding("rows", "warning", found, "Pass rows with prompts, or take the recipe guide or paper.")
    return rows, Finding("rows", "ok", found)


def _check_lengths(rows: Dataset, max_length: int, context: int | None) -> Finding:
    limit = min(max_length, context or max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    too_long = sum(length > limit for length in lengths)
    found = f"{too_long} of {len(lengths)} rows are longer than {limit} tokens; the longest has {max(lengths)}."
    if not too_long:
        return Finding("context", "ok", found)
    cure = (
        "Raise `max_length`"
        if limit == max_length and limit != context
        else "Split them: the model's context ends there"
    )
    return Finding("context", "warning", found, f"{cure}, or their ends are not learned from.")


def _check_ids(rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> Finding:
    """Whether every id, also that of the padding, has an embedding."""
    highest = max(padding_id(tokenizer), *(max(row["input_ids"]) for row in rows))
    found = f"The highest token id is {highest}, and the model has {num_embeddings} embeddings."
    if highest < num_embeddings:
        return Finding("vocabulary", "ok", found)
    remedy = "Take the tokenizer that the model was trained with, or `model.resize_token_embeddings(len(tokenizer))`."
    return Finding("vocabulary", "problem", found, remedy)


def _bytes_of(ids: list[int]) -> bytes:
    return bytes(index - BYTE_OFFSET for index in ids if BYTE_OFFSET <= index < BYTE_OFFSET + 256)


def _check_patches(model: CoconutForCausalLM, documents: list[bytes]) -> Iterator[Finding]:
    """
    The guide's troubleshooting: is the entropy predictor the right kind, is it trained, are its thresholds sane
    here?
    """
    rule, predictor = model.binary_patch_module.rule, model.latent_transformer.entropy_predictor
    if rule.needs_entropies:
        finding = _check_predictor(predictor, documents)
        yield finding
        if finding.level == "problem":
            return
    enough = sum(map(len, documents)) >= ENOUGH_BYTES
    yield _check_thresholds(model, documents if enough else [_PROSE.encode()])


def _check_predictor(predictor: ByteEntropyPredictor, documents: list[bytes]) -> Finding:
    remedy = "Take `load_entropy_predictor()` or train one on your bytes, then train the model on its patches."
    vocabulary = predictor.get_input_embeddings().weight.shape[0]
    if not isinstance(predictor, ByteEntropyPredictor) or vocabulary != 256:
        found = f"{type(predictor).__name__} has a vocabulary of {vocabulary}, and not the 256 bytes."
        return Finding("entropy predictor", "problem", found, remedy)
    bits = {"English": _bits_per_byte(predictor, [_PROSE.encode()])}
    if any(len(document) > 1 for document in documents):
        bits["the rows"] = _bits_per_byte(predictor, documents)
    found = f"Bits per byte: {', '.join(f'{value:.2f} of {name}' for name, value in bits.items())}; 8 is guessing."
    if min(bits.values()) > UNTRAINED_BITS:
        return Finding("entropy predictor", "problem", f"It looks untrained. {found}", remedy)
    if bits.get("the rows", 0) > UNTRAINED_BITS:
        remedy = (
            "Train one on bytes like these (`examples/train_entropy_predictor.py`), then the model on its patches."
        )
        return Finding("entropy predictor", "warning", f"It knows little of these rows. {found}", remedy)
    return Finding("entropy predictor", "ok", found)


def _check_thresholds(model: CoconutForCausalLM, documents: list[bytes]) -> Finding:
    rule, predictor = model.binary_patch_module.rule, model.latent_transformer.entropy_predictor
    settings = asdict(rule)
    patcher = EntropyPatcher(predictor, **settings, add_special_tokens=False)
    lengths = torch.tensor([length for patched in patcher.patch(documents) for length in patched.patch_lengths])
    mean, longest = lengths.float().mean().item(), lengths.max().item()
    alone = (lengths == 1).float().mean().item()
    found = f"Patches have {mean:.1f} bytes on average, {alone:.0%} have one, the longest has {longest}."
    window = model.config.encoder_config.sliding_window
    if not USUAL_PATCH_SIZES[0] <= mean <= USUAL_PATCH_SIZES[1] or alone > MAX_ONE_BYTE_PATCHES:
        if not rule.needs_entropies:
            return Finding("thresholds", "warning", found, "Change `config.max_patch_length`, or the rule.")
        better = calibrate_threshold(documents, predictor, **settings)
        remedy = (
            f"Set `model.binary_patch_module.threshold = {better.threshold:.4g}` and `.relative_threshold = "
            f"{better.relative_threshold:.4g}`, which give {better.patch_size:.1f} bytes here, and train the model on them."
        )
        return Finding("thresholds", "warning", found, remedy)
    if window is not None and longest > window:
        remedy = f"Set `config.max_patch_length` to {window} or less: the encoder looks no further back."
        return Finding("thresholds", "warning", found, remedy)
    return Finding("thresholds", "ok", found)


@torch.no_grad()
def _bits_per_byte(predictor: ByteEntropyPredictor, documents: list[bytes]) -> float:
    """What it takes the predictor to tell each byte from those before it in its context."""
    context, nats, count, left = predictor.config.max_position_embeddings, 0.0, 0, _BYTES
    for document in documents:
        data = torch.tensor(list(document[:left]), device=predictor.device)
        left -= len(data)
        for part in data.split(context) if len(data) else ():
            if len(part) > 1:
                nats += predictor(part[None], labels=part[None], use_cache=False).loss.item() * (len(part) - 1)
                count += len(part) - 1
    return nats / NATS_PER_BIT / count


def _check_objective(
    recorder: LayerRecorder,
    model: PreTrainedModel | PeftModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Finding]:
    """Both passes of CROW on the beginning of two rows, without a step."""
    ids = [row["input_ids"][:_TOKENS] for row in rows.select(range(min(2, len(rows))))]
    batch = CrowDataCollator(padding_id(tokenizer))([{"input_ids": row, "labels": row} for row in ids])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = recorder.prepare({name: value.to(model.device) for name, value in batch.items()})
            options = {"epsilon": 0.1, "epsilon_mode": "absolute", "layers": "paper"}
            _, terms = crow_terms(recorder, model, model, inputs, **options)
    except ValueError as error:
        yield Finding("objective", "problem", str(error), "Take another model, or rows that it takes.")
        return
    finally:
        model.train(was_training)
    values = {name: value.item() for name, value in terms.items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        found = f"`{bad[0]}` is {values[bad[0]]} on the first rows, in {str(model.dtype).removeprefix('torch.')}."
        yield Finding("objective", "problem", found, "Load the model in float32.")
        return
    found = (
        f"Both passes work: consecutive layers are {values['consistency_clean']:.2g} apart, perturbed "
        f"{values['consistency_perturbed']:.2g}; epsilon 0.1 is {values['perturbation_ratio']:.2g} times the embeddings' length."
    )
    if values["perturbation_ratio"] > 1:
        yield Finding("objective", "warning", found + " That drowns them.", "Pass epsilon_mode='relative'.")
    else:
        yield Finding("objective", "ok", found)
    guessing = math.log(recorder.base.get_input_embeddings().weight.shape[0])
    found = f"{values['loss_lm']:.2f} nats per token on the first rows; {guessing:.2f} is guessing."
    if values["loss_lm"] >= guessing:
        remedy = "Train the model first, or check that tokenizer and rows are those of this model."
        yield Finding("language model", "warning", found, remedy)
    else:
        yield Finding("language model", "ok", found)
