"""Tests of the logits at answer positions, on every family of decoders, against those of all positions."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutput

from crow_hf.training import answer_logits as module
from crow_hf.training.answer_logits import answer_logits, predicting_positions, token_log_likelihoods
from crow_hf.training.recorder import recorder_of
from helpers.blt import tiny_blt
from helpers.coconut import coconut
from helpers.families import DEEP, FAMILIES, GROUPED, SLIDING, tiny_family
from helpers.tiny import pad_rows, ragged_rows, tiny_llama


# Models that change their logits after the head.
SCALING = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GROUPED | SLIDING, final_logit_softcapping=0.5)),
    "cohere": (CohereForCausalLM, CohereConfig(**DEEP, logit_scale=0.1)),
    "granite": (GraniteForCausalLM, GraniteConfig(**DEEP, logits_scaling=8.0)),
}
BATCH = pad_rows(ragged_rows(3, seed=4))


def build(name):
    if name in FAMILIES:
        return tiny_family(name).eval()
    if name in SCALING:
        model_class, config = SCALING[name]
        set_seed(0)
        return model_class(config).eval()
    return {"blt": tiny_blt, "coconut": coconut}[name]().eval()


def everywhere(model, inputs):
    """The logits of all positions, selected by a loop."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    rows, length = inputs["labels"].shape
    return torch.stack(
        [
            logits[row, place - 1]
            for row in range(rows)
            for place in range(1, length)
            if inputs["labels"][row, place] != -100
        ]
    )


def shapes_at_head(model):
    """A list that will hold the shapes of all inputs of the head."""
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: shapes.append(args[0].shape[:-1]))
    return shapes


def assert_same(model, inputs, forward=None):
    """Logits and gradients equal those of all positions. Returns the shapes that the head saw."""
    twin, shapes = copy.deepcopy(model), shapes_at_head(model)
    found, wanted = answer_logits(model, forward or model, inputs), everywhere(twin, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    for logits in (found, wanted):
        (logits * weights).sum().backward()
    trained = 0
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if other.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, k=key: k + text
            )
            trained += bool(other.grad.any())
    assert trained > 2
    return shapes


@pytest.mark.parametrize("name", [*FAMILIES, *SCALING, "coconut", "blt"])
def test_logits_and_gradients_are_those_of_all_positions(name):
    """Fails if positions are shifted, or if scaling and soft-capping are lost. The head sees the answers only."""
    model = build(name)
    inputs = recorder_of(model).prepare(BATCH)
    assert assert_same(model, inputs) == [(1, int(predicting_positions(BATCH["labels"]).sum()))]


def test_positions_are_one_before_the_labels():
    labels = torch.tensor([[5, -100, 6, 7], [-100, -100, -100, 8]])
    assert predicting_positions(labels).tolist() == [[False, True, True, False], [False, False, True, False]]


def test_activation_checkpointing_changes_nothing():
    model = tiny_llama().train()
    model.activation_checkpointing_enable()
    assert_same(model, BATCH)


def test_adapters_also_on_the_head():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    base = model.get_base_model()
    assert assert_same(base, BATCH, forward=model)[0][0] == 1


@pytest.mark.slow
def test_compiled_models_keep_no_positions_of_another_batch():
    """Fails if a hook becomes a part of the compiled graph."""
    model = tiny_llama().eval()
    model.compile(backend="eager")
    for seed in (4, 5, 6):
        batch = pad_rows(ragged_rows(3, seed=seed), 12)
        torch.testing.assert_close(answer_logits(model, model, batch), everywhere(tiny_llama(), batch))
        torch.testing.assert_close(everywhere(model, batch), everywhere(tiny_llama(), batch))


class UnusualHead(nn.Module):
    """Calls its head on `(B * S, D)`, by keyword, or not at all as a module."""

    config = LlamaConfig()

    def __init__(self, way):
        super().__init__()
        self.table, self.head, self.way = nn.Embedding(260, 8), nn.Linear(8, 260, bias=False), way

    def get_output_embeddings(self):
        return None if self.way == "no module" else self.head

    def forward(self, input_ids, attention_mask):
        hidden = self.table(input_ids)
        if self.way == "flat":
            logits = self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        elif self.way == "keyword":
            logits = self.head(input=hidden)
        else:
            logits = hidden @ self.head.weight.T
        return CausalLMOutput(logits=logits)


@pytest.mark.parametrize("way", ["flat", "keyword", "weights", "no module"])
def test_unusual_heads_give_the_same_logits(way):
    torch.manual_seed(0)
    model = UnusualHead(way)
    torch.testing.assert_close(answer_logits(model, model, BATCH), everywhere(model, BATCH))


def test_the_head_is_as_before_afterwards():
    """Fails if a hook is left, also after an error."""
    model = tiny_llama()

    def fail(**inputs):
        raise RuntimeError

    answer_logits(model, model, BATCH)
    with pytest.raises(RuntimeError):
        answer_logits(model, fail, BATCH)
    inputs = {name: value for name, value in BATCH.items() if name != "labels"}
    assert model(**inputs).logits.shape[:2] == BATCH["input_ids"].shape
    assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2


def test_batches_without_answers():
    model = tiny_llama()
    assert answer_logits(model, model, BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}).shape == (0, 260)


@pytest.mark.parametrize("chunk_size", [1, 1000, 2**22])
def test_log_likelihoods_are_those_of_a_loop(chunk_size, monkeypatch):
    """Fails if a chunk is left out, if labels belong to another position, or if half precision is summed."""
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk_size)
    model = tiny_llama().bfloat16()
    logits = answer_logits(model, model, BATCH).detach()
    answers = [label for row in BATCH["labels"].tolist() for label in row[1:] if label != -100]
    wanted = [logits[place].float().log_softmax(-1)[token] for place, token in enumerate(answers)]
    torch.testing.assert_close(token_log_likelihoods(logits, BATCH["labels"]), torch.stack(wanted))
