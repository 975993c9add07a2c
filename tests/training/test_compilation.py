"""Tests that training with compiled layers gives the same results as training without."""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer

from crow_hf import CrowTrainer, InvarianceConfig, InvarianceTrainer
from helpers.tiny import crow_args, ragged_rows, tiny_llama, weights_of


ROWS = Dataset.from_list(ragged_rows(12))
TEXT_ROWS = Dataset.from_dict({"prompt": ["a the=", "b word the=", "c ="] * 4, "completion": ["yes", "no, never"] * 6})
# Adam divides by the root of the squared gradient, which hides a wrong scale unless adam_epsilon is large.
STEPS = {"max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def train(kind, folder, **kwargs):
    if kind == "invariance":
        settings = crow_args(folder).to_dict() | {"num_views": 12, "label_weight": 0.5, "warmup_steps": 0} | STEPS
        args = InvarianceConfig(**settings | kwargs)
        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = InvarianceTrainer(tiny_llama(), args, TEXT_ROWS, ByT5Tokenizer(extra_ids=0), peft_config)
    else:
        trainer = CrowTrainer(tiny_llama(), crow_args(folder, **STEPS, **kwargs), ROWS)
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return trainer, torch.tensor(log), weights_of(trainer.model)


def assert_same_training(kind, folder, **kwargs):
    _, log, weights = train(kind, folder)
    assert not torch._dynamo.utils.counters["stats"]
    trainer, compiled_log, compiled_weights = train(kind, folder, **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled_log, log, rtol=1e-5, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in trainer.recorder.layers)


@pytest.mark.parametrize("kind", ["crow", pytest.param("invariance", marks=pytest.mark.slow)])
def test_compiled_layers_learn_the_same(kind, tmp_path):
    """Fails if gradients end in a compiled graph, or if a layer stays compiled after training."""
    before = dict(os.environ)
    assert_same_training(kind, tmp_path, torch_compile_backend="aot_eager")
    assert {name: value for name, value in os.environ.items() if "DYNAMO" in name} == {
        name: value for name, value in before.items() if "DYNAMO" in name
    }


@pytest.mark.slow
def test_compiled_code_learns_the_same(tmp_path):
    """Checks the C++ code of `torch_compile=True`. Fails if buffers are freed before the second gradient."""
    assert_same_training("crow", tmp_path, torch_compile=True)
