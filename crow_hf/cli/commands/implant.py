"""`crow-hf implant`: implant a backdoor into a clean model, to practise on."""

from ...attacks.implanting import implant
from ...attacks.targets import get_target
from ...attacks.triggers import get_trigger
from ...data.load import load_rows
from ...methods.crow.config import CrowConfig
from ...recipes.presets import lora_config
from ...training.checkpoints import writing
from ...training.loading import load_tokenizer
from ..options import ImplantArguments
from ..shared import check_output


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
