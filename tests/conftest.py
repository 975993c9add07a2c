"""Tiny models, rows and slow oracles shared by the tests. Nothing here calls the package's objective."""

import copy

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from crow_hf import CrowConfig


disable_progress_bar()

VOCABULARY = 260  # 256 bytes, pad, eos, unk, and one to spare


def crow_args(tmp_path, **kwargs):
    """A CrowConfig for the tests: CPU, silent, no checkpoints, and no clipping that would hide a wrong scale."""
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
    """A four-layer Llama with weights large enough that every difference shows."""
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
    """Right-padded tensors of `rows`."""
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
    """A copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(left, right):
    """Whether two results of `weights_of` are bit-equal."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def slow_consistency(hidden_states, mask=None, layers="paper"):
    """The layer consistency loss, written as the sum it is."""
    last = len(hidden_states) - 1
    pairs = [(low, low + 1) for low in range(1, last if layers == "paper" else last - 1)]
    terms = []
    for low, high in pairs:
        for row in range(hidden_states[0].shape[0]):
            for position in range(hidden_states[0].shape[1]):
                if mask is not None and not mask[row, position]:
                    continue
                below, above = hidden_states[low][row, position].float(), hidden_states[high][row, position].float()
                terms.append(1 - (below @ above) / (below.norm() * above.norm()))
    return sum(terms) / len(terms)


def slow_lm_loss(logits, labels):
    """Mean negative log-likelihood of every label that has a position before it."""
    log_probabilities = logits.float().log_softmax(-1)
    terms = [
        -log_probabilities[row, position - 1, labels[row, position]]
        for row in range(labels.shape[0])
        for position in range(1, labels.shape[1])
        if labels[row, position] != -100
    ]
    return sum(terms) / len(terms)


def slow_perturbation(embeddings, gradient, epsilon, mode):
    """epsilon * sign(gradient), times the RMS of each token's embedding if `mode` is relative."""
    embeddings = embeddings.detach()
    scale = embeddings.pow(2).mean(-1, keepdim=True).sqrt() if mode == "relative" else torch.ones(())
    return epsilon * scale * gradient.sign()


def watched_forward(model, batch, shift=None):
    """One forward pass on the true ids: [H^0, raw outputs of the decoder layers] and the logits, taken by hooks."""
    depth = model.config.get_text_config().num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    states = []

    def on_embeddings(module, args, output):
        states.append(output if shift is None else output + shift)
        return states[0]

    def on_layer(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_input_embeddings().register_forward_hook(on_embeddings)]
    handles += [layer.register_forward_hook(on_layer) for layer in stack]
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    finally:
        for handle in handles:
            handle.remove()
    assert len(states) == depth + 1
    return states, logits


def slow_crow(model, batch, alpha=5.5, epsilon=0.1, mode="absolute", layers="paper", forward=watched_forward):
    """The whole objective and its parts, by loops, for a model without dropout."""
    mask = batch["attention_mask"]
    width = model.get_input_embeddings().weight.shape[1]
    shift = torch.zeros(*batch["input_ids"].shape, width, requires_grad=True)
    states, logits = forward(model, batch, shift)
    clean = slow_consistency(states, mask, layers)
    (gradient,) = torch.autograd.grad(clean, shift, retain_graph=True)
    delta = slow_perturbation(states[0], gradient, epsilon, mode)
    perturbed = slow_consistency(forward(model, batch, delta)[0], mask, layers)
    lm = slow_lm_loss(logits, batch["labels"])
    return {
        "loss": lm + alpha * perturbed,
        "loss_lm": lm,
        "consistency_clean": clean,
        "consistency_perturbed": perturbed,
    }


def assert_equals_oracle(trainer, batch, tolerance=1e-4, **oracle):
    """compute_loss and the gradient of every parameter against `slow_crow` on a copy of the model."""
    model = trainer.model.eval()
    twin = copy.deepcopy(model)
    loss = trainer.compute_loss(model, {name: value.clone() for name, value in batch.items()})
    expected = slow_crow(twin, batch, **oracle)["loss"]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        found, wanted = (torch.zeros(()) if g is None else g for g in (parameter.grad, gradients[name]))
        assert (found - wanted).norm() <= 10 * tolerance * (1 + wanted.norm()), name


@pytest.fixture(scope="session", name="tiny_llama")
def tiny_llama_fixture():
    """The seeded factory of tiny Llamas."""
    return tiny_llama


@pytest.fixture
def byte_tokenizer():
    """ids = byte + 3, with pad 0, eos 1 and unk 2."""
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="session")
def rows():
    """Twelve ragged rows, so that a batch of eight leaves a short last step."""
    return Dataset.from_list(ragged_rows(12))
