"""Purify a suspect model with a LoRA: its weights do not change, and only the adapter is saved.

    python examples/purify_lora.py --model SUSPECT --dataset CLEAN_ROWS.jsonl --output_dir purified-adapter

The settings are those of the paper (section 4.4). Any argument of `CrowConfig` changes them.
`load_causal_lm("purified-adapter")` loads the adapter, and the suspect from the path in the adapter's config.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from crow_hf import CrowConfig, CrowTrainer, doctor, load_causal_lm
from crow_hf.data.load import load_rows
from crow_hf.recipes.presets import PAPER, lora_config


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str = field(metadata={"help": "About 100 clean rows: a file or a name on the Hub."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    target_modules: str | None = field(
        default=None,
        metadata={"help": "Names of the layers to put the LoRA on, separated by commas. Default: all linear layers."},
    )


def main() -> None:
    parser = HfArgumentParser([ScriptArguments, CrowConfig])
    parser.set_defaults(**PAPER)
    script, args = parser.parse_args_into_dataclasses()
    rows = load_rows(script.dataset)
    problems = [
        f"{finding.found} {finding.remedy}"
        for finding in doctor(script.model, rows, learning_rate=args.learning_rate, max_length=args.max_length)
        if finding.level == "problem"
    ]
    if problems:
        raise SystemExit("\n".join(problems))

    lora = lora_config(script.lora_r)
    if script.target_modules:
        lora.target_modules = set(script.target_modules.split(","))
    trainer = CrowTrainer(script.model, args, rows, peft_config=lora)
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()

    # To get a full model instead, merge the adapter: `purified.merge_and_unload().save_pretrained(...)`.
    purified = load_causal_lm(args.output_dir)
    base = purified.peft_config["default"].base_model_name_or_path
    print(f"The adapter is in {args.output_dir}. Its base model is {base}.")


if __name__ == "__main__":
    main()
