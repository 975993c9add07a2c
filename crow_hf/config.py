"""The arguments of a CROW run."""

import json
import math
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import TrainingArguments


SECRET = re.compile(r"(^|[_-])(token|password|secret|api_?key)$", re.IGNORECASE)
HIDDEN = "(hidden)"


def without_secrets(value: Any) -> Any:
    """Without the values of keys that are called tokens, and without what looks like one of the Hub's."""
    if isinstance(value, Mapping):
        return {key: without_secrets(held) for key, held in value.items() if not SECRET.search(str(key))}
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.dumps(without_secrets(json.loads(value)))
        except ValueError:
            return HIDDEN
    return re.sub(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)", HIDDEN, value) if isinstance(value, str) else value


def _check_amounts(args: TrainingArguments, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")


def _check_whole(args: TrainingArguments, name: str, least: int) -> None:
    value = getattr(args, name)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def _read_json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'`{name}` must be JSON in braces, such as {{"dtype": "bfloat16"}}, got {text!r}.')
    return value


@dataclass(repr=False)
class CrowConfig(TrainingArguments):
    r"""
    Arguments of [`CrowTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below.

    > Parameters of the method

    Args:
        alpha (`float`, *optional*, defaults to `5.5`):
            Weight of the consistency loss (equation 6). The paper uses 5.5, and 11 against refusal backdoors. 0 is plain
            fine-tuning on the same rows in the same order: the control to run beside every purification.
        epsilon (`float`, *optional*, defaults to `0.1`):
            Size of the FGSM step per coordinate of the embeddings (equation 5).
        epsilon_mode (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` as published; `"relative"` takes epsilon in units of each token embedding's RMS, which means the
            same for a model with small and for one with large embeddings.
        consistency_layers (`str`, *optional*, defaults to `"paper"`):
            `"paper"` compares the layers (1, 2)..(N-1, N); `"reference"` leaves out the last one as the published code
            does.

        perturb (`str`, *optional*, defaults to `"embeddings"`):
            What the FGSM step is taken on. `"embeddings"`, as published: of tokens, or of bytes in a [`CoconutForCausalLM`].
            That model has also `"patches"`, its patch embeddings, and `"thoughts"`, which every row must then have.

    > Parameters of the data and the model

    Args:
        max_length (`int`, *optional*, defaults to `1024`):
            Longest row in tokens; longer ones are cut at the end, with a warning that counts them. Never more than the
            model's own context.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` when the trainer's `model` is a path. On the command line, JSON.

    > Defaults that differ from [`~transformers.TrainingArguments`]

    `learning_rate=2e-5`, `num_train_epochs=3`, `logging_steps=1` (a purification has some dozens of steps), and
    `ddp_find_unused_parameters=False` (parameters that a batch does not use are nothing to wait for here).

    Raises:
        `ValueError`: For a negative or non-finite alpha or epsilon, and for options under which the two passes would
            silently be wrong: label smoothing, a static DDP graph, reentrant checkpointing.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; the paper uses 1e-3 with LoRA."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the clean rows."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})

    alpha: float = field(
        default=5.5, metadata={"help": "Weight of the consistency loss; 0 is plain fine-tuning, the control."}
    )
    epsilon: float = field(default=0.1, metadata={"help": "Size of the adversarial step on the embeddings."})
    epsilon_mode: str = field(
        default="absolute",
        metadata={
            "help": "Unit of epsilon: the embeddings' own, or each token embedding's RMS.",
            "choices": ["absolute", "relative"],
        },
    )
    consistency_layers: str = field(
        default="paper",
        metadata={
            "help": "Layer pairs: all from (1, 2), or without the last layer as the published code does.",
            "choices": ["paper", "reference"],
        },
    )
    perturb: str = field(
        default="embeddings",
        metadata={
            "help": "What the step is taken on; patches and thoughts only in a Coconut.",
            "choices": ["embeddings", "patches", "thoughts"],
        },
    )
    max_length: int = field(default=1024, metadata={"help": "Longest row in tokens; longer ones are cut at the end."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, as JSON, when the model is a path."}
    )

    def __post_init__(self):
        _check_amounts(self, "alpha", "epsilon", "learning_rate")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            _check_whole(self, name, 1)
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs` must be more than 0, or nothing is purified, got {self.num_train_epochs}."
            )
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = _read_json_object("model_init_kwargs", self.model_init_kwargs)
        if self.epsilon_mode not in ("absolute", "relative"):
            raise ValueError(f"`epsilon_mode` must be 'absolute' or 'relative', got {self.epsilon_mode!r}.")
        if self.consistency_layers not in ("paper", "reference"):
            raise ValueError(f"`consistency_layers` must be 'paper' or 'reference', got {self.consistency_layers!r}.")
        if self.perturb not in ("embeddings", "patches", "thoughts"):
            raise ValueError(f"`perturb` must be 'embeddings', 'patches' or 'thoughts', got {self.perturb!r}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 tokens, got {self.max_length}.")
        if self.label_smoothing_factor:
            raise ValueError("CROW computes its own loss: leave `label_smoothing_factor` at 0.")
        if self.ddp_static_graph:
            raise ValueError("`ddp_static_graph` loses gradients of the two passes: leave it off.")
        if self.ddp_find_unused_parameters:
            raise ValueError("`ddp_find_unused_parameters` is not needed, and fails with two passes: leave it off.")
        self.ddp_find_unused_parameters = False
        super().__post_init__()
        for kwargs in (self.activation_checkpointing_kwargs, self.gradient_checkpointing_kwargs):
            if kwargs and kwargs.get("use_reentrant"):
                raise ValueError(
                    "Reentrant checkpointing cannot be differentiated twice: set `use_reentrant` to False or leave it out."
                )

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`]. Trackers write it down, so that no token may be in it."""
        values = super().to_dict()
        return values | {"model_init_kwargs": without_secrets(values["model_init_kwargs"])}

    def __str__(self) -> str:
        shown = copy(self)
        shown.model_init_kwargs = without_secrets(self.model_init_kwargs)
        return super(CrowConfig, shown).__str__()

    # A dataclass would write one that shows the token of the Hub.
    __repr__ = __str__


@dataclass(repr=False)
class InvarianceConfig(CrowConfig):
    r"""
    Arguments of [`InvarianceTrainer`], the recipe "strong": those of [`CrowConfig`] and the ones below. Each part of the
    objective ([`crow_hf.invariance`]) is switched off by its weight.

    Args:
        decoy_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the prompts with decoys.
        adversarial_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the prompts with adversarial decoys.
        adversarial_steps (`int`, *optional*, defaults to `2`):
            Sign steps of the adversary; 0 makes them ordinary decoys.
        adversarial_step_size (`float`, *optional*, defaults to `0.35`):
            Of one such step per coordinate, in units of each embedding's RMS.
        distillation_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the prompts as they are.
        label_weight (`float`, *optional*, defaults to `1.0`):
            Share of the rows' own answers in what is taught; the rest is what the suspect would answer. A suspect often shows
            something of its backdoor on clean prompts too, which its own answers keep. For prompts alone [`purify`] takes 0.
        num_views (`int`, *optional*, defaults to `1600`):
            How many prompts are trained on in all: every row is used as often as that takes, each time with other decoys. Never
            fewer than there are rows.
        keep (`float`, *optional*, defaults to `0.3`):
            Share of the suspect's weights that is mixed into the purified ones at the end. More brings back right answers, and
            now and then a stubborn backdoor; less is safer.
        screen_rows (`bool`, *optional*, defaults to `True`):
            Whether [`purify`] leaves out rows that carry a trigger ([`crow_hf.screening`]).
        num_canaries (`int`, *optional*, defaults to `2`):
            How many backdoors of its own [`purify`] puts into the model first ([`crow_hf.canaries`]): what shuts them shuts others
            with them. 0 for none.
        max_answer_length (`int`, *optional*, defaults to `128`):
            Longest answer of the suspect, in tokens, to prompts without one.

    > Defaults that differ from [`CrowConfig`]

    `alpha=0.0`, `learning_rate=7e-4`, `per_device_train_batch_size=16`, `num_train_epochs=1` (over all views), a cosine schedule
    with a tenth of warm-up, `train_sampling_strategy="group_by_length"` (decoys differ much in length).
    """

    alpha: float = field(default=0.0, metadata={"help": "Weight of CROW's consistency loss on adversarial decoys."})
    learning_rate: float = field(default=7e-4, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a batch, each in three views."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over all views of the rows."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or a share of all steps below 1."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the views: those of one length together saves padding.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    decoy_weight: float = field(default=1.0, metadata={"help": "Weight of the prompts with decoys."})
    adversarial_weight: float = field(default=1.0, metadata={"help": "Weight of the prompts with adversarial decoys."})
    adversarial_steps: int = field(default=2, metadata={"help": "Sign steps of the adversary."})
    adversarial_step_size: float = field(
        default=0.35, metadata={"help": "Size of such a step, in units of each embedding's RMS."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the prompts as they are."})
    label_weight: float = field(
        default=1.0, metadata={"help": "Share of the rows' own answers in what is taught, beside the suspect's."}
    )
    num_views: int = field(
        default=1600, metadata={"help": "Prompts to train on in all; each row comes again with other decoys."}
    )
    keep: float = field(
        default=0.3,
        metadata={"help": "Share of the suspect's weights that is mixed into the purified ones at the end."},
    )
    screen_rows: bool = field(default=True, metadata={"help": "Leave out rows that carry a trigger."})
    num_canaries: int = field(default=2, metadata={"help": "Backdoors of our own to put in first; 0 for none."})
    max_answer_length: int = field(
        default=128, metadata={"help": "Longest answer of the suspect to clean prompts that come without one."}
    )

    def __post_init__(self):
        _check_amounts(
            self, "distillation_weight", "decoy_weight", "adversarial_weight", "adversarial_step_size", "keep"
        )
        for name, least in {
            "adversarial_steps": 0,
            "num_views": 1,
            "num_canaries": 0,
            "max_answer_length": 1,
        }.items():
            _check_whole(self, name, least)
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"`label_weight` is a share between 0 and 1, got {self.label_weight!r}.")
        if self.keep >= 1:
            raise ValueError(f"`keep` must be less than 1, or nothing of the purification is left, got {self.keep}.")
        if self.eval_strategy != "no":
            raise ValueError("The strong objective has no evaluation loss: leave `eval_strategy` at 'no'.")
        if self.perturb != "embeddings":
            raise ValueError("The adversary pushes embeddings: leave `perturb` at 'embeddings'.")
        super().__post_init__()


def rows_in_step(args: TrainingArguments) -> int:
    """How many rows an optimizer step has, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def leaving_nothing(args: CrowConfig, folder: str) -> CrowConfig:
    """The arguments of a run beside the one that was asked for: it saves, pushes and reports nothing."""
    return replace(args, output_dir=folder, save_strategy="no", push_to_hub=False, report_to="none")


def fine_tuning_config(args: CrowConfig, max_steps: int) -> CrowConfig:
    """
    The arguments of plain fine-tuning with a purification's learning rate, schedule and batch size.

    Args:
        args (`CrowConfig`):
            Of the purification.
        max_steps (`int`):
            How many steps to take; -1 for as many epochs as `args` says.
    """
    shared = {each.name: getattr(args, each.name) for each in fields(CrowConfig) if each.init}
    # Rows without decoys are of much the same length: they may come in any order, as in fine-tuning.
    changes = {"train_sampling_strategy": "random"} if isinstance(args, InvarianceConfig) else {}
    return CrowConfig(**shared | changes | {"alpha": 0.0, "max_steps": max_steps})
