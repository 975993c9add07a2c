"""The arguments of Invariance training."""

import math
from copy import copy
from dataclasses import dataclass, field, fields
from typing import TypeVar

from peft import PeftModel
from transformers import PreTrainedModel

from ...training.recorder import embedding_table
from ..crow.config import CrowConfig, check_integer, check_non_negative


ArgumentsT = TypeVar("ArgumentsT", bound=CrowConfig)
# The learning rate for models of this width, that of SmolLM2-135M, and how it falls with the width below.
LEARNING_RATE, WIDTH, WIDTH_EXPONENT = 5e-4, 576, 0.78
# The weight of the adversarial term, with and without phrases that the adversary leads to. A phrase shows in the first
# tokens of an answer, and the divergence is a mean over all of them.
ADVERSARIAL_WEIGHTS = {True: 5.0, False: 1.0}


@dataclass(repr=False)
class InvarianceConfig(CrowConfig):
    r"""
    Arguments of [`InvarianceTrainer`]: those of [`CrowConfig`] and the ones below.

    Each term of the Invariance objective ([`crow_hf.methods.invariance.objective`]) is switched off by a weight of 0.

    Args:
        decoy_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the prompts with decoys.
        adversarial_weight (`float`, *optional*):
            Weight of the prompts with adversarial decoys. By default, 5 if the adversary leads to phrases, and 1 if it
            does not.
        adversarial_steps (`int`, *optional*, defaults to `2`):
            Number of sign steps of the adversary, if it does not lead to phrases. With 0, adversarial decoys are then
            ordinary decoys.
        adversarial_step_size (`float`, *optional*, defaults to `0.35`):
            Size of such a step for each coordinate, in units of the RMS of each embedding.
        num_phrases (`int`, *optional*, defaults to `2`):
            Largest number of phrases that [`purify`] looks for and leads the adversary to, if the suspect knows them
            by heart ([`find_phrases`]). If nearly all answers begin alike, there are as many again after that
            beginning. With 0, the adversary leads away from the right answers.
        distillation_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the plain prompts.
        label_weight (`float`, *optional*, defaults to `0.0`):
            Share of the rows' own answers in the training target. The rest is the suspect's distribution. Answers
            that are learned by heart cost the model other knowledge. [`purify`] uses 0 for rows that have only
            prompts.
        num_written_rows (`int`, *optional*, defaults to `100`):
            Number of rows that [`purify`] lets the suspect write itself ([`write_rows`]), about anything. Training on
            them keeps what the clean rows do not cover. 0 uses the clean rows alone, and so does a suspect that knows
            no prompts ([`can_write_prompts`]).
        num_views (`int`, *optional*, defaults to `1600`):
            Total number of training prompts, and never less than the number of rows. Rows are repeated until there
            are as many, each time with other decoys.
        keep (`float`, *optional*, defaults to `0.0`):
            Share of the suspect's weights that is mixed into the purified weights after training. A larger share
            restores more right answers and, occasionally, a stubborn backdoor. A smaller share is safer.
        max_kl (`float`, *optional*):
            Budget for what may be forgotten: the largest KL(suspect || purified) in nats per token, both on answers to
            clean prompts and on running text. [`purify`] mixes in as much of the suspect's weights as that takes. A
            small budget can bring the backdoor back. `None` sets no limit.
        screen_rows (`bool`, *optional*, defaults to `True`):
            Whether [`purify`] drops rows that carry a trigger ([`crow_hf.evidence.screening`]).
        num_canaries (`int`, *optional*, defaults to `2`):
            Number of backdoors of our own that [`purify`] implants first ([`crow_hf.evidence.canaries`]). In our
            trials, implanting them weakened real backdoors too. A canary that died proves little about a real
            backdoor, which is mostly harder to remove. 0 implants none.
        max_answer_length (`int`, *optional*, defaults to `128`):
            Maximum length, in tokens, of the suspect's answers to prompts that have none.

        learning_rate (`float`, *optional*):
            Peak learning rate. By default, 5e-4 for models of width 576 or more, and 5e-4 * (576 / width) ** 0.78 for
            narrower ones.

    > Defaults that differ from [`CrowConfig`]

    `alpha=0.0`, `per_device_train_batch_size=16`, `num_train_epochs=1` (over all views), a cosine schedule with one
    tenth of warm-up, and `train_sampling_strategy="group_by_length"` (decoys vary a lot in length).
    """

    _MAY_BE_NONE = CrowConfig._MAY_BE_NONE | {"learning_rate", "adversarial_weight"}

    alpha: float = field(default=0.0, metadata={"help": "Weight of CROW's consistency loss on adversarial decoys."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate. Default: 5e-4, and more for models that are narrower than 576."},
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Batch size per device. Each row has three views."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs over all views of the rows."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Number of warm-up steps, or, if below 1, their share of all steps."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the views. Grouping views of similar length saves padding.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    decoy_weight: float = field(default=1.0, metadata={"help": "Weight of the prompts with decoys."})
    adversarial_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the prompts with adversarial decoys. Default: 5 with phrases that the adversary leads "
            "to, 1 without."
        },
    )
    adversarial_steps: int = field(
        default=2, metadata={"help": "Number of sign steps of the adversary, without phrases."}
    )
    adversarial_step_size: float = field(
        default=0.35, metadata={"help": "Size of a sign step, in units of the RMS of each embedding."}
    )
    num_phrases: int = field(
        default=2, metadata={"help": "Number of phrases known by heart that the adversary leads to, if there are any."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the plain prompts."})
    label_weight: float = field(
        default=0.0,
        metadata={"help": "Share of the rows' own answers in the target. The rest is the suspect's."},
    )
    num_written_rows: int = field(
        default=100, metadata={"help": "Number of rows that the suspect writes itself, to keep what it knows."}
    )
    num_views: int = field(
        default=1600,
        metadata={"help": "Total number of training prompts, at least one per row. Rows repeat with other decoys."},
    )
    keep: float = field(
        default=0.0,
        metadata={"help": "Share of the suspect's weights that is mixed into the purified weights after training."},
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Largest KL divergence from the suspect, in nats per token of clean answers and running text. As "
            "much of the suspect's weights is mixed in as that takes."
        },
    )
    screen_rows: bool = field(default=True, metadata={"help": "Drop rows that carry a trigger."})
    num_canaries: int = field(
        default=2, metadata={"help": "Number of canaries, backdoors of our own, to implant first."}
    )
    max_answer_length: int = field(
        default=128,
        metadata={"help": "Maximum length, in tokens, of the suspect's answers to prompts that have none."},
    )

    def __post_init__(self) -> None:
        check_non_negative(
            self, "distillation_weight", "decoy_weight", "adversarial_weight", "adversarial_step_size", "keep"
        )
        for name, least in {
            "adversarial_steps": 0,
            "num_phrases": 0,
            "num_views": 1,
            "num_canaries": 0,
            "num_written_rows": 0,
            "max_answer_length": 1,
        }.items():
            check_integer(self, name, least)
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"`label_weight` must be between 0 and 1, got {self.label_weight!r}.")
        if self.keep >= 1:
            raise ValueError(
                f"`keep` must be less than 1, or the suspect's weights replace the purified ones, got {self.keep}."
            )
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ValueError(f"`max_kl` must be a positive number of nats, or None for no limit, got {self.max_kl!r}.")
        if self.eval_strategy != "no":
            raise ValueError("The Invariance objective has no evaluation loss. Leave `eval_strategy` at 'no'.")
        if self.perturb != "embeddings":
            raise ValueError("The adversary perturbs embeddings. Leave `perturb` at 'embeddings'.")
        super().__post_init__()


def with_learning_rate(args: ArgumentsT, model: PreTrainedModel | PeftModel) -> ArgumentsT:
    """
    Choose the learning rate by the width of a model, if none is set.

    A model of width 576 or more gets 5e-4. Narrower ones need more: 5e-4 * (576 / width) ** 0.78. The exponent is that
    of the best rates of LoRA for models of the Llama family (`tinker_cookbook.hyperparam_utils`).

    Args:
        args ([`CrowConfig`]):
            The arguments. They are not changed.
        model (`PreTrainedModel` or `PeftModel`):
            The model that will be trained.

    Returns:
        [`CrowConfig`]: Arguments with a learning rate.
    """
    if args.learning_rate is not None:
        return args
    args, width = copy(args), embedding_table(model).shape[1]
    args.learning_rate = LEARNING_RATE * max(1.0, WIDTH / width) ** WIDTH_EXPONENT
    return args


def with_adversarial_weight(args: InvarianceConfig, leads_to_phrases: bool) -> InvarianceConfig:
    """
    Choose the weight of the adversarial term, if none is set.

    Args:
        args ([`InvarianceConfig`]):
            The arguments.
        leads_to_phrases (`bool`):
            Whether the adversary leads to phrases.

    Returns:
        [`InvarianceConfig`]: The arguments themselves, or a copy with `adversarial_weight`.
    """
    if args.adversarial_weight is not None:
        return args
    args = copy(args)
    args.adversarial_weight = ADVERSARIAL_WEIGHTS[leads_to_phrases]
    return args


def fine_tuning_config(args: CrowConfig, max_steps: int) -> CrowConfig:
    """
    Arguments of plain fine-tuning with the learning rate, schedule and batch size of a purification.

    Args:
        args (`CrowConfig`):
            The arguments of the purification.
        max_steps (`int`):
            Number of steps. -1 trains for `args.num_train_epochs`.

    Returns:
        `CrowConfig`: The arguments, with `alpha=0`.
    """
    shared = {each.name: getattr(args, each.name) for each in fields(CrowConfig) if each.init}
    # Rows without decoys have similar lengths and can come in random order, as in plain fine-tuning.
    changes = {"train_sampling_strategy": "random"} if isinstance(args, InvarianceConfig) else {}
    return CrowConfig(**shared | changes | {"alpha": 0.0, "max_steps": max_steps})
