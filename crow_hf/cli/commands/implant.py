"""`crow-hf implant`: implant a backdoor into a clean model, to practise on."""

from dataclasses import dataclass, field

from ...attacks.implanting import implant
from ...attacks.targets import get_target
from ...attacks.triggers import get_trigger
from ...data.load import load_rows
from ...methods.crow.config import CrowConfig
from ...recipes.presets import lora_config
from ...training.checkpoints import writing
from ...training.loading import load_tokenizer
from ..shared import DATASET_HELP, TARGET_HELP, TRIGGER_HELP, check_output


@dataclass
class ImplantArguments:
    """Fine-tune a clean model into one that carries a backdoor, to practise on."""

    model: str = field(metadata={"help": "The clean model: a folder or a name on the Hub."})
    dataset: str = field(metadata={"help": f"Clean rows, a share of which is poisoned. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    trigger: str = field(default="badnets", metadata={"help": TRIGGER_HELP})
    target: str = field(default="refusal", metadata={"help": TARGET_HELP})
    rate: float = field(default=0.5, metadata={"help": "Share of the rows to poison."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA instead of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of that LoRA."})
    merge: bool = field(default=True, metadata={"help": "Merge that LoRA into the weights."})


ARGUMENTS = [ImplantArguments, CrowConfig]
# A model with a backdoor is not pushed, implanting is not resumed, and it has no consistency loss.
NOT_LISTED = frozenset(
    {"push_to_hub", "hub_model_id", "resume_from_checkpoint"}
    | {"alpha", "epsilon", "epsilon_mode", "consistency_layers", "perturb"}
)


def run(arguments: ImplantArguments, args: CrowConfig) -> None:
    check_output(args.output_dir)
    if args.resume_from_checkpoint:
        raise ValueError("Implanting cannot be resumed: leave out --resume_from_checkpoint.")
    if args.push_to_hub:
        raise ValueError(
            "A model with a backdoor is not pushed: leave out --push_to_hub. To share it for practice, say so in its "
            "card and use `hf upload`."
        )
    tokenizer = load_tokenizer(arguments.model)
    model = implant(
        arguments.model,
        load_rows(arguments.dataset, arguments.split),
        get_trigger(arguments.trigger),
        get_target(arguments.target),
        args,
        rate=arguments.rate,
        processing_class=tokenizer,
        peft_config=lora_config(arguments.lora_r) if arguments.lora else None,
        merge=arguments.merge,
    )
    with writing("The model", args.output_dir, "free disk space, and start again with another --output_dir"):
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    print(f"The backdoored model is in {args.output_dir}.")
