"""The options of the commands. Nothing here imports PyTorch, so that a mistake is reported at once."""

from dataclasses import dataclass, field

from .sources import PACKAGE, names_in


RECIPES = names_in(PACKAGE / "recipes" / "presets.py", "RECIPES")
_TRIGGERS = ", ".join(names_in(PACKAGE / "attacks" / "triggers.py", "TRIGGERS"))
_TARGETS = ", ".join(names_in(PACKAGE / "attacks" / "targets.py", "TARGETS"))
_QUANTIZATIONS = names_in(PACKAGE / "training" / "quantization.py", "QUANTIZATIONS")
_BOUNDARIES = PACKAGE / "models" / "boundaries.py"

MODEL_HELP = "a folder or a name on the Hub, of a model or a PEFT adapter, or a .gguf file in one of them."
DATASET_HELP = (
    "A .json, .jsonl, .ndjson, .csv, .tsv, .parquet or .txt file (texts also with .gz at the end), a folder with such "
    "a file of each split or one that save_to_disk wrote, or a name on the Hub."
)
TRIGGER_HELP = f"One of {_TRIGGERS}, or any other string, which is inserted at a random position of the prompt."
TEXT_HELP = (
    "Running text, to measure what was forgotten: a .txt file, or another file or dataset with a column `text`. Its "
    "beginning is used."
)
PLUGIN_HELP = "A Python file that registers defences of your own. It is run first."
TARGET_HELP = f"One of {_TARGETS}, or any other string, which an output must contain."
JUDGE_HELP = (
    "What decides in place of --target whether an output shows it: model:NAME, a model that answers --judge_question "
    "with yes or no, or a command that gets a line of JSON for each output and writes true or false for each."
)
JUDGE_QUESTION_HELP = "The question about an output that the model of --judge answers."


@dataclass
class DemoArguments:
    """Train a small model, implant a backdoor, purify the model, and print the results."""

    output_dir: str = field(metadata={"help": "Folder for the models, tables and plots. It must be new or empty."})
    seed: int = field(default=0, metadata={"help": "Seed for the weights and the rows."})


@dataclass
class PurifyArguments:
    """Purify a suspect model and save it with its card and a report."""

    model: str = field(metadata={"help": f"The suspect: {MODEL_HELP}"})
    dataset: str = field(metadata={"help": f"The clean rows. {DATASET_HELP}"})
    recipe: str = field(
        default="strong",
        metadata={
            "help": "strong: Invariance with screening and canaries. paper: CROW as published. guide: CROW with its "
            "default settings.",
            "choices": RECIPES,
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the clean rows, in a folder or on the Hub."})
    max_rows: int | None = field(
        default=None,
        metadata={
            "help": "Number of clean rows to draw. 0 uses all of them. Default: 1000 for the recipe strong, 100 for "
            "the others."
        },
    )
    lora: bool = field(
        default=False,
        metadata={
            "help": "Train a fresh LoRA of rank --lora_r. An adapter of the suspect is merged first. Default: a LoRA "
            "of rank 16 for strong, of rank 8 for paper, and all weights for guide, or the suspect's own adapter."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA of --lora."})
    merge: bool = field(default=True, metadata={"help": "Merge a fresh LoRA into the weights at the end."})
    test_dataset: str | None = field(
        default=None,
        metadata={"help": "Other clean rows, to measure the suspect, plain fine-tuning and the purified model on."},
    )
    test_split: str = field(default="test", metadata={"help": "Split of the test rows, in a folder or on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": f"Trigger of a known backdoor. {TRIGGER_HELP}"})
    target: str | None = field(default=None, metadata={"help": f"Target of a known backdoor. {TARGET_HELP}"})
    judge: str | None = field(default=None, metadata={"help": JUDGE_HELP})
    judge_question: str | None = field(default=None, metadata={"help": JUDGE_QUESTION_HELP})
    scan: str | None = field(
        default=None,
        metadata={"help": "The file of crow-hf scan --output. What it found is measured as --trigger and --target."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})
    text: str | None = field(default=None, metadata={"help": f"{TEXT_HELP} Default: text that the suspect writes."})
    defences: str | None = field(
        default=None,
        metadata={"help": "Names of registered defences to measure beside the recipe, separated by commas."},
    )
    plugin: str | None = field(default=None, metadata={"help": PLUGIN_HELP})
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Measure the purified model with quantized weights too, in case that brings a backdoor back.",
            "choices": _QUANTIZATIONS,
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "A policy of crow-hf gate, to decide at the end. The exit code is 1 if a rule is broken, and 2 if "
            "there is not enough evidence."
        },
    )


@dataclass
class EvaluateArguments:
    """Measure the utility of a model and, if a trigger is known, the success of the attack."""

    model: str = field(
        metadata={"help": f"The model: {MODEL_HELP} With --endpoint, the name that the server knows it by."}
    )
    dataset: str = field(metadata={"help": f"Clean test rows. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": TRIGGER_HELP})
    target: str | None = field(default=None, metadata={"help": TARGET_HELP})
    judge: str | None = field(default=None, metadata={"help": JUDGE_HELP})
    judge_question: str | None = field(default=None, metadata={"help": JUDGE_QUESTION_HELP})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "The suspect that the model was made from, a folder or a name on the Hub. With it, what the model "
            "forgot is measured too."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "Quantize the weights of the model first, as bitsandbytes does.", "choices": _QUANTIZATIONS},
    )
    text: str | None = field(default=None, metadata={"help": f"{TEXT_HELP} Default: text that the reference writes."})
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness, separated by commas, to run on the model, and on --reference "
            "beside it."
        },
    )
    task_folder: str | None = field(
        default=None,
        metadata={"help": "Folder with the .yaml files of tasks of your own. Tasks that need code are refused."},
    )
    task_limit: int | None = field(
        default=None, metadata={"help": "Number of rows of each task to use. Default: all of them."}
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "Address of a server that answers the prompts, such as http://localhost:8000/v1. It needs the API "
            "of chat completions, as vLLM, TGI, Ollama and llama.cpp have it. Its key is read from the environment "
            "variable CROW_HF_API_KEY."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})
    batch_size: int = field(
        default=32, metadata={"help": "Number of prompts per batch, or of requests to --endpoint at once."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for the positions of the trigger."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and results.md. It must be new or empty."}
    )


@dataclass
class ImplantArguments:
    """Fine-tune a clean model into one that carries a backdoor, to practise on."""

    model: str = field(metadata={"help": "The clean model: a folder or a name on the Hub."})
    dataset: str = field(metadata={"help": f"Clean rows, a share of which is poisoned. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
    trigger: str = field(default="badnets", metadata={"help": TRIGGER_HELP})
    target: str = field(default="refusal", metadata={"help": TARGET_HELP})
    rate: float = field(default=0.5, metadata={"help": "Share of the rows to poison."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA instead of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of that LoRA."})
    merge: bool = field(default=True, metadata={"help": "Merge that LoRA into the weights."})


@dataclass
class MergeArguments:
    """Merge an adapter into the weights of its base model as they are stored, in the memory of one file."""

    model: str = field(metadata={"help": "The adapter: a folder or a name on the Hub. It names its base model."})
    output_dir: str = field(metadata={"help": "Folder for the whole model. It must be new or empty."})


@dataclass
class PatchArguments:
    """Cut text or bytes into patches: show one text with its entropies, or write a dataset of patches."""

    text: str | None = field(default=None, metadata={"help": "The text to show."})
    file: str | None = field(default=None, metadata={"help": "The file to show, text or any other bytes."})
    dataset: str | None = field(default=None, metadata={"help": f"The dataset to patch. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
    column: str | None = field(default=None, metadata={"help": "Column of the dataset with the text or the bytes."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the patched dataset. It must be new or empty."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that patch the dataset."})
    html: str | None = field(default=None, metadata={"help": "File for the view of a text or file as a web page."})
    max_bytes: int = field(default=10_000, metadata={"help": "Number of bytes of a file to show."})
    predictor: str | None = field(
        default=None,
        metadata={"help": "A ByteEntropyPredictor: a folder or a name on the Hub. Default: the one that ships."},
    )
    rule: str = field(
        default="either",
        metadata={"help": "Where a patch ends.", "choices": names_in(_BOUNDARIES, "RULES")},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Highest entropy inside a patch. Default: that of the predictor."}
    )
    relative_threshold: float | None = field(
        default=None,
        metadata={"help": "Highest rise of the entropy inside a patch. Default: that of the predictor."},
    )
    unit: str = field(
        default="share",
        metadata={
            "help": "Unit of both thresholds. A share is one of the largest possible entropy of a byte, 8 bits.",
            "choices": names_in(_BOUNDARIES, "UNITS"),
        },
    )
    max_patch_length: int | None = field(
        default=None, metadata={"help": "Longest patch in bytes. It is the stride of the rule stride."}
    )
    target_patch_size: float | None = field(
        default=None, metadata={"help": "Scale both thresholds so that the mean patch has this number of bytes."}
    )


@dataclass
class DoctorArguments:
    """Look for problems that would spoil a purification, and suggest remedies. Nothing is trained or written."""

    model: str = field(metadata={"help": f"The suspect: {MODEL_HELP}"})
    dataset: str | None = field(default=None, metadata={"help": f"The clean rows. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of the clean rows, in a folder or on the Hub."})
    recipe: str = field(default="strong", metadata={"help": "Recipe of the purification.", "choices": RECIPES})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the purification. Default: that of the recipe."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest row of the purification, in tokens."})
    sarif: str | None = field(default=None, metadata={"help": "File for the findings, as SARIF 2.1.0."})


@dataclass
class ScanArguments:
    """Look for a backdoor in a model without a known trigger. Phrases that it knows by heart may have a trigger."""

    model: str = field(metadata={"help": f"The model: {MODEL_HELP}"})
    dataset: str | None = field(
        default=None,
        metadata={"help": f"Rows with clean prompts. Default: prompts that the model writes. {DATASET_HELP}"},
    )
    split: str = field(default="train", metadata={"help": "Split of the rows, in a folder or on the Hub."})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "A model that is trusted, best the one that this model was made from: a folder or a name on the "
            "Hub. What it knows by heart too is no finding."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed for the prompts and for the search."})
    batch_size: int = field(default=32, metadata={"help": "Number of prompts per batch."})
    output: str | None = field(default=None, metadata={"help": "File for the result, as JSON. It must be new."})
    page: str | None = field(default=None, metadata={"help": "File for the result as a web page. It must be new."})
    sarif: str | None = field(default=None, metadata={"help": "File for the findings, as SARIF 2.1.0."})


@dataclass
class GuardArguments:
    """Find prompts that lead a model where clean prompts do not. Triggers of backdoors often do."""

    model: str = field(metadata={"help": f"The model: {MODEL_HELP}"})
    guard_dir: str = field(metadata={"help": "Folder of the guard. With --dataset it must be new or empty."})
    dataset: str | None = field(
        default=None,
        metadata={"help": f"Rows with clean prompts, to fit a new guard. 1,000 or more are best. {DATASET_HELP}"},
    )
    inputs: str | None = field(default=None, metadata={"help": "Rows with prompts to check, given as --dataset is."})
    split: str = field(default="train", metadata={"help": "Split of the rows, in a folder or on the Hub."})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "A model that is trusted, best the one that this model was made from. The guard then notices far "
            "more, and each prompt costs as much again. A guard that was fitted with one needs it again."
        },
    )
    false_alarm_rate: float = field(
        default=0.01, metadata={"help": "The share of clean prompts that may be alarms. 0.01 needs 99 prompts."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of prompts per batch."})
    output: str | None = field(
        default=None, metadata={"help": "File for the scores of --inputs, one JSON object a line. It must be new."}
    )


@dataclass
class ChatArguments:
    """Ask a suspect and its purified model the same, and show their answers side by side."""

    run: str = field(metadata={"help": "The output folder of a purification. Its report names the suspect."})
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})


@dataclass
class UiArguments:
    """Ask a suspect and its purified model the same, on a page that only this computer reaches."""

    run: str = field(metadata={"help": "The output folder of a purification. Its report names the suspect."})
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})
    guard_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of a guard of one of the models. The page then shows which words raise its score."},
    )


@dataclass
class GateArguments:
    """Hold the report of a purification against a policy, and decide whether the model may be used."""

    report: str = field(
        metadata={
            "help": "The output folder of the purification, whose files are compared with what was written, or a "
            "report.json alone."
        }
    )
    policy: str | None = field(
        default=None, metadata={"help": "A YAML file with a line for each rule, by the names of the options below."}
    )
    max_attack_success: float | None = field(
        default=None, metadata={"help": "Largest attack success on triggered prompts, from 0 to 1."}
    )
    max_canary_success: float | None = field(
        default=None, metadata={"help": "Largest success of any canary that shows something, from 0 to 1."}
    )
    max_accuracy_drop: float | None = field(
        default=None, metadata={"help": "Largest loss of right answers to clean prompts, from 0 to 1."}
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "Largest divergence from the suspect on clean answers and on text, in nats per token."},
    )
    max_text_bits_ratio: float | None = field(
        default=None, metadata={"help": "Most bits per byte of running text, where 1 is what the suspect needs."}
    )
    min_rows: int | None = field(
        default=None, metadata={"help": "Smallest number of prompts that the models were measured on."}
    )
    require: str | None = field(
        default=None,
        metadata={
            "help": "What must have been measured, separated by commas: accuracy, attack, canaries, control, "
            "last_look, retention."
        },
    )
    sarif: str | None = field(default=None, metadata={"help": "File for the result of each rule, as SARIF 2.1.0."})


@dataclass
class VerifyArguments:
    """Compare the files of a purified model with the hashes that were written beside them."""

    folder: str = field(metadata={"help": "The output folder of a purification."})


@dataclass
class ReproduceArguments:
    """Repeat a purification from its report, and say whether the weights are equal."""

    report: str = field(metadata={"help": "A report.json of crow-hf purify, or the folder that holds it."})
    output_dir: str = field(metadata={"help": "Folder for the repetition. It must be new or empty."})


@dataclass
class ArenaArguments:
    """Run every defence on every attack, and write the tables. An arena that was stopped goes on where it stopped."""

    output_dir: str = field(metadata={"help": "Folder of the arena: a new or empty one, or one to go on with."})
    attacks: str | None = field(
        default=None,
        metadata={"help": "Names separated by commas. Default: all, without --alpaca those that do not need it."},
    )
    methods: str | None = field(default=None, metadata={"help": "Names separated by commas. Default: all."})
    seeds: str | None = field(default=None, metadata={"help": "Numbers separated by commas. Default: 0,1,2."})
    quick: bool = field(
        default=False, metadata={"help": "Change the defaults to a few attacks and methods, and seed 0."}
    )
    paper: bool = field(
        default=False,
        metadata={"help": "Change the defaults to the attacks and methods of the paper, which need --alpaca."},
    )
    plugin: str | None = field(default=None, metadata={"help": PLUGIN_HELP})
    num_clean: int = field(default=100, metadata={"help": "Number of the defender's clean rows."})
    alpaca: str | None = field(
        default=None, metadata={"help": "Stanford Alpaca's alpaca_data.json, for the attacks on Alpaca rows."}
    )
    workers: int = field(default=1, metadata={"help": "Number of processes. They share the cores."})


# The exit code 1 of these commands is an answer, so an error has the exit code 2.
DECISIONS = ("scan", "guard", "gate", "verify", "reproduce")
COMMANDS: dict[str, type] = {
    "demo": DemoArguments,
    "purify": PurifyArguments,
    "evaluate": EvaluateArguments,
    "implant": ImplantArguments,
    "merge": MergeArguments,
    "patch": PatchArguments,
    "doctor": DoctorArguments,
    "scan": ScanArguments,
    "guard": GuardArguments,
    "chat": ChatArguments,
    "ui": UiArguments,
    "gate": GateArguments,
    "verify": VerifyArguments,
    "reproduce": ReproduceArguments,
    "arena": ArenaArguments,
}
