"""A suspect's folder and its rows, damaged in a way that a seed decides."""

import json
import random
import shutil
import struct
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast

from helpers.tiny import tiny_llama


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Settings that are not in every file, and that a library acts on.
NAMES = (
    *("model_type", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config", "rope_parameters"),
    *("rope_scaling", "layer_types", "text_config", "attn_implementation", "transformers_weights", "num_labels"),
    *("tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "chat_template", "model_max_length"),
    *("eos_token_id", "pad_token_id", "bos_token", "eos_token", "truncation_side", "cache_implementation", "use_dora"),
    *("output_hidden_states", "return_dict", "is_encoder_decoder", "tie_word_embeddings", "trainable_token_indices"),
    *("role", "content", "input_ids", "labels", "attention_mask", "completion", "messages", "text", "triggered"),
)
SCALARS = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, 2**31, -(2**63), 2**64, 10**30, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "null", "float16", "int8", "../../x", "a" * 100_000),
    *("\ud800", "\x00", "\x1b[2J", "[red]", "é\u202e", "{{ 1/0 }}", "(a+)+$"),
)
TEMPLATES = (
    *("", "{{", "{% for %}", "{{ messages[9].content }}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ x.y.z }}"),
    *("{{ messages }}", "{{ 9 ** 9 ** 9 }}", "{% for i in range(10 ** 9) %}a{% endfor %}", "{{ 'a' * 10 ** 12 }}"),
    *("{{ ''.__class__ }}", "{% include 'x' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "(" * 10_000),
    *("{{ messages | tojson }}", "{{ messages[0].content | int + 'a' }}", "{{ strftime_now(1) }}", "{{" + "(" * 5_000),
)


# Well-formed settings that do not fit, by file.
GRAFTS: dict[str, dict[str, list]] = {
    "config.json": {
        "vocab_size": [0, 100, 259, 10**9],
        "num_hidden_layers": [-1, 0, 2, 4],
        "hidden_size": [0, 15, 10**6],
        "num_attention_heads": [0, 3, 16],
        "max_position_embeddings": [-1, 0, 1, 8, "128"],
        "dtype": ["nope", "load", "int8", "float16", "complex64"],
        "rope_parameters": [{}, {"rope_type": "x"}, {"rope_type": "dynamic", "factor": 0}, "default"],
        "quantization_config": [7, {}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "x"}],
        "architectures": [[], [None], ["LlamaForSequenceClassification"]],
        "pad_token_id": [-1, 99999, [0]],
        "eos_token_id": [-1, [1, 5, 99999], list(range(260))],
        "auto_map": ["x", 7, {"AutoModelForCausalLM": None}],
    },
    "generation_config.json": {
        "eos_token_id": ["x", list(range(260)), [[1]], 1.5],
        "temperature": [-1, 0, "x"],
        "sequence_bias": [{"x": 1}, [[[1], 1.0]], 5],
        "cache_implementation": ["x", "static"],
    },
    "tokenizer.json": {
        "normalizer": [
            {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""},
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        ],
        "pre_tokenizer": [
            {"type": "Split", "pattern": {"Regex": "(a+)+$|(\\w+\\s?)*z"}, "behavior": "Isolated", "invert": False}
        ],
        "post_processor": [None, {"type": "BertProcessing", "sep": ["x", 9999], "cls": ["y", 9999]}],
        "decoder": [None, {"type": "Fuse"}],
        "model": [
            {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
            {"type": "BPE", "vocab": {}, "merges": []},
            {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
        ],
        "truncation": [{"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}],
        "added_tokens": [[]],
    },
    "tokenizer_config.json": {
        "tokenizer_class": ["Evil", "ByT5Tokenizer", "BertTokenizer", "PreTrainedTokenizer"],
        "pad_token": [{"a": 1}, 5, "new", ""],
        "eos_token": [None, "", "the", ["</s>"]],
        "chat_template": [5, [], [{"name": "x"}], "{{ 1/0 }}"],
        "model_max_length": [-5, 0, "512", None],
        "added_tokens_decoder": [{"x": {"content": "x"}}, {"5000": {"content": "the"}}, []],
    },
    "adapter_config.json": {
        "peft_type": ["LOHA", "PROMPT_TUNING", "X", None],
        "r": [0, -1, 10**9, "x"],
        "target_modules": [[], "(", None, ["lm_head"]],
        "base_model_name_or_path": [None, "", ".", 5, "/proc"],
        "alora_invocation_tokens": [[1], [None], "x"],
        "rank_pattern": [{"q_proj": 0}, {"(": 2}, []],
    },
    "model.safetensors.index.json": {"weight_map": [{}, [], {"x": "y.bin"}, {"x": "../model/x"}, {"x": 5}]},
}


def make_suspects(folder: Path) -> dict[str, Path]:
    """Save a model, the same in two shards, and an adapter on top of it, each with rows and with all settings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the sky is blue"], words)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    model = tiny_llama(num_hidden_layers=3)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    paths = {kind: folder / kind for kind in ("model", "shards", "adapter")}
    model.save_pretrained(paths["model"])
    model.save_pretrained(paths["shards"], max_shard_size="20KB")
    for kind in ("model", "shards"):
        _write(paths[kind] / "config.json", model.config.to_dict())
        _write(paths[kind] / "generation_config.json", model.generation_config.to_dict())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(paths["model"])
    adapted.save_pretrained(paths["adapter"])
    for path in paths.values():
        fast.save_pretrained(path)
        rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(4)]
        chat = [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "yes"}]}
            for row in rows
        ]
        ids = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1]}] * 4
        for name, each in {"rows": rows, "chat": chat, "ids": ids}.items():
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
        (path / "rows.json").write_text(json.dumps(chat))
        (path / "rows.csv").write_text("prompt,completion\n" + "What is it?,yes\n" * 4)
        Dataset.from_list(rows).to_parquet(path / "rows.parquet")
    return paths


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def damaged_copy(suspects: dict[str, Path], folder: Path, seed: int) -> tuple[Path, Path, str]:
    """
    Copy a suspect and damage one or two files of the copy.

    Returns:
        `tuple[Path, Path, str]`: The copy, the file of its rows, and what was done.
    """
    rng = random.Random(seed)
    kind = rng.choice(sorted(suspects))
    shutil.copytree(suspects[kind], folder)
    rows, done = folder / rng.choice(["rows.jsonl", "rows.jsonl", "chat.jsonl"]), [kind]
    for _ in range(rng.choice([1, 1, 1, 2])):
        # Several files of weights or of rows count as one.
        files = {path.name if path.suffix == ".json" else path.suffix: path for path in sorted(folder.iterdir())}
        file = files[rng.choice(sorted(files.keys() - {".md"}))]
        if file.name == "rows.json":
            rows = file
        elif file.stem in ("rows", "chat", "ids"):
            file = rows = rng.choice([path for path in sorted(folder.iterdir()) if path.suffix == file.suffix])
        done.append(f"{file.name}: {_damage_file(file, rng)[:200]}")
    return folder, rows, ", ".join(done)


def _damage_file(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.15 or file.suffix in (".csv", ".parquet"):
        return _damage_bytes(file, rng)
    if file.suffix == ".jinja":
        file.write_text(text := rng.choice(TEMPLATES))
        return text
    whole = file.read_bytes()
    try:
        if file.suffix == ".safetensors":
            end = 8 + struct.unpack("<Q", whole[:8])[0]
            head, done = _damage(json.loads(whole[8:end]), rng)
            text = _text(head, rng)
            file.write_bytes(struct.pack("<Q", len(text)) + text + whole[end:])
        elif file.suffix == ".jsonl":
            lines, done = _damage([json.loads(line) for line in whole.splitlines()], rng)
            lines = lines if isinstance(lines, list) else [lines]
            file.write_bytes(b"".join(_text(line, rng) + b"\n" for line in lines))
        else:
            value, done = _graft(json.loads(whole), file.name, rng)
            file.write_bytes(_text(value, rng))
    except (ValueError, RecursionError, struct.error, MemoryError):
        # It was damaged before.
        return _damage_bytes(file, rng)
    return done


def _graft(tree: object, name: str, rng: random.Random) -> tuple[object, str]:
    """Set something that a library knows and that does not fit, or anything."""
    if name not in GRAFTS or not isinstance(tree, dict) or rng.random() < 0.5:
        return _damage(tree, rng)
    key = rng.choice(sorted(GRAFTS[name]))
    tree[key] = rng.choice(GRAFTS[name][key])
    return tree, f"{key} = {str(tree[key])[:100]}"


def _text(value: object, rng: random.Random) -> bytes:
    """Write JSON, sometimes with characters as they are, such as halves of a pair."""
    return json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def _damage_bytes(file: Path, rng: random.Random) -> str:
    whole = file.read_bytes()
    at = rng.randrange(len(whole) + 1)
    kinds = {
        "cut": lambda: whole[:at],
        "empty": lambda: b"",
        "one byte": lambda: whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :],
        "inserted": lambda: whole[:at] + rng.choice([b"\x00", b"\xff\xfe", b'"', b"\n", b"{", b","]) + whole[at:],
        "utf-16": lambda: whole.decode("latin-1").encode("utf-16"),
        "mark": lambda: b"\xef\xbb\xbf" + whole,
        "deep": lambda: b"[" * 100_000,
        "deep object": lambda: b'{"a":' * 50_000,
        "twice": lambda: whole + whole,
        "ones": lambda: whole[:at] + b"\xff" * (len(whole) - at),
        "large": lambda: whole[:at] + b"\x7e" * (len(whole) - at),
        "zeros": lambda: whole[:at] + b"\x00" * (len(whole) - at),
        "noise": lambda: rng.randbytes(1_000),
        "nothing": lambda: b"null",
        "list": lambda: b"[1]",
        "a key twice": lambda: whole.replace(b"{", b'{"a": 1, "a": 2, ', 1),
    }
    kind = rng.choice(sorted(kinds))
    file.write_bytes(kinds[kind]())
    return f"{kind} at {at}"


def _hostile(rng: random.Random, value: object) -> object:
    """Return something to stand in the place of a value."""
    deep: object = value
    for _ in range(rng.choice([3, 60, 400])):
        deep = [deep]
    return rng.choice(
        [
            *(lambda: rng.choice(SCALARS),) * 6,
            lambda: [],
            lambda: {},
            lambda: [value],
            lambda: {rng.choice(NAMES): value},
            lambda: str(value)[:1000],
            lambda: deep,
            lambda: [value] * 1_000,
            lambda: rng.choice(sorted(CONFIG_MAPPING.keys())),
            lambda: -value if isinstance(value, (int, float)) else value,
        ]
    )()


def _damage(tree: object, rng: random.Random) -> tuple[object, str]:
    """Change one place of a JSON tree. Places near its root are likelier."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.03:
        new = _hostile(rng, tree)
        return new, f"{str(tree)[:60]!r} -> {str(new)[:60]!r}"
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.7:
        tree[key], done = _damage(tree[key], rng)
        return tree, f"{key}.{done}"
    kind = rng.choice(["drop", "add", "move", "set", "set", "set", "set"])
    if kind == "drop" or (kind != "set" and isinstance(tree, list)):
        del tree[key]
        return tree, f"{key} dropped"
    if kind == "move":
        name = rng.choice(NAMES)
        tree[name] = tree.pop(key)
        return tree, f"{key} renamed {name}"
    name = rng.choice(NAMES) if kind == "add" else key
    tree[name] = _hostile(rng, tree.get(name) if isinstance(tree, dict) else tree[name])
    return tree, f"{name} = {str(tree[name])[:60]!r}"
