"""methods.invariance.config"""

from dataclasses import dataclass, field, fields

from ..crow.config import CrowConfig, _check_amounts, _check_whole


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
