"""Tiny models, rows, and comparisons of weights."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)

from crow_hf import ByteEntropyPredictor, CrowConfig


VOCABULARY = 260  # 256 bytes, pad, eos, unk, and one to spare


def crow_args(tmp_path, **kwargs):
    """
    A CrowConfig for the tests: CPU, silent, no checkpoints, and no gradient clipping, which would hide a wrong scale.
    """
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 1e6,
        "per_device_train_batch_size": 4,
    }
    return CrowConfig(output_dir=str(tmp_path / "run"), **(defaults | kwargs))


def tiny_llama(seed=0, **kwargs):
    """A four-layer Llama. Its weights are large enough to make every difference visible."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(defaults | kwargs)))


def tiny_mixtral():
    """Return a mixture of experts, whose experts are one tensor in memory and many in the file."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def tiny_gpt2(dropout, seed=0):
    """A four-layer GPT-2 with one dropout rate everywhere."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=4,
        n_head=2,
        n_positions=64,
        initializer_range=0.2,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def ragged_rows(count, seed=0, longest=12):
    """Rows of 4 to `longest` random tokens whose labels start anywhere in the first half."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (draw(4, longest + 1),), generator=generator).tolist()
        prompt = draw(0, len(ids) // 2 + 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def pad_rows(rows, width=None, pad_id=0):
    """The rows as a batch that is padded on the right."""
    width = width or max(len(row["input_ids"]) for row in rows)

    def fill(column, value):
        return torch.tensor([row[column] + [value] * (width - len(row[column])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": fill("input_ids", pad_id),
        "attention_mask": torch.tensor(mask),
        "labels": fill("labels", -100),
    }


def weights_of(model):
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(left, right):
    """Whether two results of `weights_of` are bit-identical."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tiny_predictor(seed=0, **kwargs):
    """A predictor whose weights are so large that every byte of the context matters."""
    defaults = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ff_dim": 48, "initializer_range": 0.4}
    set_seed(seed)
    return ByteEntropyPredictor(**(defaults | kwargs)).eval()
