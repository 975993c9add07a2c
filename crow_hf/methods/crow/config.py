"""The arguments of CROW training."""

import json
import math
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ...secrets import remember_secrets, without_secrets
from ...training.recorder import Perturb
from .objective import EpsilonMode, Layers


def check_non_negative(args: "CrowConfig", *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is None and name in args._MAY_BE_NONE:
            continue
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")


def check_integer(args: TrainingArguments, name: str, least: int) -> None:
    value = getattr(args, name)
    if not isinstance(value, int) or not least <= value < 2**32:
        raise ValueError(f"`{name}` must be an integer of at least {least} and below 2**32, got {value!r}.")


def _read_json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        # It can hold a token, so it is not shown.
        raise ValueError(f'`{name}` must be JSON in braces, such as {{"dtype": "bfloat16"}}.')
    return value


@dataclass(repr=False)
class CrowConfig(TrainingArguments):
    r"""
    Arguments of [`CrowTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below.

    > Parameters of the method

    Args:
        alpha (`float`, *optional*, defaults to `5.5`):
            Weight of the consistency loss (equation 6). The paper uses 5.5, and 11 against refusal backdoors. 0 is
            plain fine-tuning on the same rows in the same order, the control to run beside every purification.
        epsilon (`float`, *optional*, defaults to `0.1`):
            Size of the FGSM step for each coordinate of the embeddings (equation 5).
        epsilon_mode (`str`, *optional*, defaults to `"absolute"`):
            Unit of `epsilon`. `"absolute"` is the published method. `"relative"` measures epsilon in units of the RMS
            of each token's embedding, so that it means the same for models with small and with large embeddings.
        consistency_layers (`str`, *optional*, defaults to `"paper"`):
            Layer pairs to compare. `"paper"` compares (1, 2)..(N-1, N). `"reference"` omits the last layer, as the
            published code does.
        perturb (`str`, *optional*, defaults to `"embeddings"`):
            Tensors that the FGSM step perturbs. `"embeddings"` is the published method: the embeddings of tokens, or
            of bytes in a [`CoconutForCausalLM`]. A [`CoconutForCausalLM`] also accepts `"patches"`, its patch
            embeddings, and `"thoughts"`, which every row must then have.

    > Parameters of the data and the model

    Args:
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum row length in tokens, limited by the model's context. Longer rows are truncated at the end, and a
            warning says how many.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` if the trainer's `model` is a path. JSON on the command line.

    > Defaults that differ from [`~transformers.TrainingArguments`]

    `learning_rate=2e-5`, `num_train_epochs=3`, `logging_steps=1` (a purification has a few dozen steps), and
    `ddp_find_unused_parameters=False` (DDP does not need to wait for parameters that a batch does not use).

    Raises:
        `ValueError`: For a negative or non-finite alpha or epsilon, and for options that would silently make the two
            passes wrong: label smoothing, a static DDP graph, reentrant checkpointing.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]
    _MAY_BE_NONE = frozenset({"neftune_noise_alpha"})

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; the paper uses 1e-3 with LoRA."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of epochs over the clean rows."})
    logging_steps: float = field(default=1, metadata={"help": "Number of steps between two log lines."})

    alpha: float = field(
        default=5.5, metadata={"help": "Weight of the consistency loss. 0 is plain fine-tuning, the control."}
    )
    epsilon: float = field(default=0.1, metadata={"help": "Size of the adversarial step on the embeddings."})
    epsilon_mode: EpsilonMode = field(
        default="absolute",
        metadata={
            "help": "Unit of epsilon: absolute, or relative to the RMS of each token's embedding.",
            "choices": ["absolute", "relative"],
        },
    )
    consistency_layers: Layers = field(
        default="paper",
        metadata={
            "help": "Layer pairs to compare: all from (1, 2), or without the last layer as in the published code.",
            "choices": ["paper", "reference"],
        },
    )
    perturb: Perturb = field(
        default="embeddings",
        metadata={
            "help": "Tensors that the adversarial step perturbs. Patches and thoughts exist only in a Coconut model.",
            "choices": ["embeddings", "patches", "thoughts"],
        },
    )
    max_length: int = field(
        default=1024, metadata={"help": "Maximum row length in tokens. Longer rows are truncated at the end."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, as JSON, if the model is a path."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = _read_json_object("model_init_kwargs", self.model_init_kwargs)
        remember_secrets(vars(self))
        # Nothing else checks the last two. A negative weight decay lets weights grow.
        check_non_negative(self, "alpha", "epsilon", "learning_rate", "weight_decay", "neftune_noise_alpha")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_integer(self, name, 1)
        for name in ("seed", *(["data_seed"] if self.data_seed is not None else [])):
            check_integer(self, name, 0)
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs` must be greater than 0, or the model is not trained, got {self.num_train_epochs}."
            )
        if self.epsilon_mode not in ("absolute", "relative"):
            raise ValueError(f"`epsilon_mode` must be 'absolute' or 'relative', got {self.epsilon_mode!r}.")
        if self.consistency_layers not in ("paper", "reference"):
            raise ValueError(f"`consistency_layers` must be 'paper' or 'reference', got {self.consistency_layers!r}.")
        if self.perturb not in ("embeddings", "patches", "thoughts"):
            raise ValueError(f"`perturb` must be 'embeddings', 'patches' or 'thoughts', got {self.perturb!r}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 tokens, got {self.max_length}.")
        if self.label_smoothing_factor:
            raise ValueError("CROW computes its own loss. Leave `label_smoothing_factor` at 0.")
        if self.ddp_static_graph:
            raise ValueError("`ddp_static_graph` loses gradients of the two passes. Leave it off.")
        if self.ddp_find_unused_parameters:
            raise ValueError("`ddp_find_unused_parameters` is not needed and fails with two passes. Leave it off.")
        self.ddp_find_unused_parameters = False
        super().__post_init__()
        # PyTorch would warn in every loop over the rows.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        _check_optim_args(self)
        for kwargs in (self.activation_checkpointing_kwargs, self.gradient_checkpointing_kwargs):
            if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
                raise ValueError(
                    "Reentrant checkpointing cannot be differentiated twice. Set `use_reentrant` to False or omit it."
                )

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], without any secrets, because trackers store the result."""
        values = super().to_dict()
        return values | {"model_init_kwargs": without_secrets(values["model_init_kwargs"])}

    def __str__(self) -> str:
        shown = copy(self)
        shown.model_init_kwargs = without_secrets(self.model_init_kwargs)
        return super(CrowConfig, shown).__str__()

    # The `__repr__` of a dataclass would show the Hub token.
    __repr__ = __str__


def _check_optim_args(args: TrainingArguments) -> None:
    """Refuse arguments that the optimizer cannot read, and those that it does not read, which transformers ignores."""

    def made_with(optim_args: str | None) -> Any:
        trial = copy(args)
        trial.optim_args = optim_args
        return Trainer.get_optimizer_cls_and_kwargs(trial)

    def is_unread(name: str) -> bool:
        try:
            # No default is a question mark.
            return made_with(f"{name}=?") == made_with(None)
        except Exception:
            return False

    if not args.optim_args:
        return
    try:
        made_with(None)
    # It needs the model, or is not installed. The trainer finds that out.
    except Exception:
        return
    try:
        made_with(args.optim_args)
    except Exception as error:
        raise ValueError(
            f"`optim_args` must be `name=value` pairs with values that the optimizer takes ({error}): mend them."
        ) from error
    if unread := [name for each in args.optim_args.split(",") if is_unread(name := each.partition("=")[0].strip())]:
        raise ValueError(
            f"The optimizer {OptimizerNames(args.optim).value} takes no {', '.join(unread)} in `optim_args`: leave "
            "it out, or choose another `optim`."
        )


def rows_in_step(args: TrainingArguments) -> int:
    """Number of rows per optimizer step, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def loading_kwargs(args: CrowConfig) -> dict[str, Any]:
    """`model_init_kwargs`, which `__post_init__` has turned into a dictionary."""
    kwargs: Any = args.model_init_kwargs
    return kwargs or {}


def scratch_config(args: CrowConfig, folder: str) -> CrowConfig:
    """
    Arguments of an auxiliary run that saves, pushes and reports nothing, such as a control.

    Args:
        args (`CrowConfig`):
            The arguments of the main run.
        folder (`str`):
            Output folder of the auxiliary run.
    """
    return replace(args, output_dir=folder, save_strategy="no", push_to_hub=False, report_to="none")
