"""Purify a Llama-style model with a LoRA only: the suspect's weights stay as they are, and what is saved is the adapter.

    python examples/purify_lora.py --model SUSPECT --dataset CLEAN_ROWS.jsonl --output_dir purified-adapter

The settings are the paper's (section 4.4); any argument of `CrowConfig` changes them. The adapter is loaded by
`load_causal_lm("purified-adapter")`, which finds the suspect by the path that stands in it.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import HfArgumentParser

from crow_hf import CrowConfig, CrowTrainer, doctor, load_causal_lm
from crow_hf.data.load import load_rows
from crow_hf.recipes.presets import PAPER


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub."})
    dataset: str = field(metadata={"help": "About 100 clean rows: a file or a name on the Hub."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    target_modules: str = field(
        default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        metadata={"help": "Names of the layers it is put on, with commas between."},
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

    lora = LoraConfig(
        r=script.lora_r,
        lora_alpha=2 * script.lora_r,
        target_modules=script.target_modules.split(","),
        task_type="CAUSAL_LM",
    )
    trainer = CrowTrainer(script.model, args, rows, peft_config=lora)
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()

    # Only the adapter was written. Merged, it is a model like the suspect: `merge_and_unload().save_pretrained(...)`.
    purified = load_causal_lm(args.output_dir)
    print(
        f"The adapter is in {args.output_dir}; its base is {purified.peft_config['default'].base_model_name_or_path}."
    )


if __name__ == "__main__":
    main()
