"""Train a byte-latent model to reason in continuous thoughts, stage by stage (COCONUT's curriculum).

    python examples/train_thoughts.py --output_dir runs/thoughts --max_steps 3000 --per_device_train_batch_size 64 \\
        --learning_rate 2e-3 --warmup_steps 100 --lr_scheduler_type constant_with_warmup --eval_strategy steps \\
        --eval_steps 100

A stage ends when 95 % of the held-out rows are right, or after `--max_steps`.
Without `--dataset`, the rows are generated questions about graphs. Your own rows are a .json or .jsonl file with the
fields `question`, `steps` (a list) and `answer`. Run the command again to continue after the last finished stage.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser, LlamaConfig, TrainingArguments, set_seed

from crow_hf import CoconutForCausalLM, CoconutTokenizer, ThoughtStage, reachability_rows, train_by_stages
from crow_hf.data.load import load_rows


@dataclass
class ScriptArguments:
    dataset: str | None = field(default=None, metadata={"help": "File with the fields question, steps and answer."})
    num_rows: int = field(default=40_000, metadata={"help": "Number of questions to generate."})
    num_stages: int = field(default=2, metadata={"help": "Maximum number of steps that thoughts replace."})
    thoughts_per_step: int = field(default=2, metadata={"help": "Number of thoughts per replaced step."})
    label_thoughts: bool = field(
        default=True, metadata={"help": "Whether thoughts learn parts of the steps that they replace."}
    )


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, TrainingArguments]).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = CoconutTokenizer()
    if script.dataset is None:
        rows = reachability_rows(script.num_rows, args.seed, num_nodes=6, steps=(2,))
        # The symbols of the task have three bytes, and each is a patch. The layers over bytes see little, so that the
        # chain is learned where thoughts are: in the layers over patches.
        fields = {"patch_rule": "stride", "max_patch_length": 3}
        fields["encoder_config"] = {"sliding_window": 6, "num_hidden_layers": 1}
        fields["decoder_config"] = {"sliding_window": 2, "num_hidden_layers": 1}
    else:
        rows, fields = load_rows(script.dataset), {}
    split = rows.train_test_split(test_size=min(500, -(-len(rows) // 20)), seed=args.seed)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CoconutForCausalLM.from_backbone(LlamaConfig(**shape, initializer_range=64**-0.5), **fields)
    train_by_stages(
        model,
        args,
        split["train"],
        split["test"],
        tokenizer,
        script.num_stages,
        script.thoughts_per_step,
        label_thoughts=script.label_thoughts,
    )
    stage = ThoughtStage(tokenizer, script.num_stages, script.thoughts_per_step, drop_rest=True)
    for row in split["test"].select(range(min(3, len(split["test"])))):
        inputs = tokenizer.pad({"input_ids": [stage.prompt(row["question"])]}, return_tensors="pt")
        output = model.eval().generate(**inputs.to(model.device), max_new_tokens=40)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{row['question']}\n{answer} (right: {row['answer']})")


if __name__ == "__main__":
    main()
