"""`crow-hf implant`: implant a backdoor into a clean model, to practise on."""

from peft import PeftModel

from ...attacks.implanting import implant
from ...attacks.targets import get_target
from ...attacks.triggers import get_trigger
from ...data.load import load_rows
from ...data.visible import printable
from ...files import whole_files
from ...methods.crow.config import CrowConfig, loading_kwargs
from ...recipes.presets import lora_config
from ...training.checkpoints import remove_checkpoints, writing
from ...training.loading import load_tokenizer
from ...training.saves import cast_to, copy_side_files, hub_options, save_whole, stored_dtype
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
    kwargs = loading_kwargs(args)
    options = hub_options(arguments.model, model, kwargs)
    dtype = None if "dtype" in kwargs else stored_dtype(arguments.model, **options)
    # An adapter stays in the precision in which it was trained, as after a purification.
    if dtype is not None and not isinstance(model, PeftModel):
        cast_to(model, dtype)
    remedy = "free disk space, and start again with another --output_dir"
    with writing("The model", args.output_dir, remedy), whole_files(args.output_dir) as folder:
        save_whole(folder, model)
        tokenizer.save_pretrained(folder)
        copy_side_files(arguments.model, folder, token=kwargs.get("token"), **options)
    if args.save_total_limit is None:
        remove_checkpoints(args.output_dir)
    print(printable(f"The backdoored model is in {args.output_dir}."))
