"""Tests of adapters on 4-bit weights (QLoRA), against adapters on an ordinary model with the dequantized weights."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from crow_hf import CrowTrainer, InvarianceConfig, InvarianceTrainer, load_causal_lm, purify
from crow_hf.cli.main import main
from helpers.tiny import crow_args, ragged_rows, same_weights, tiny_llama, weights_of


bitsandbytes = pytest.importorskip("bitsandbytes")
Linear4bit = bitsandbytes.nn.Linear4bit

# Weight rows consist of whole blocks of 64, because bitsandbytes reads other sizes wrongly on a CPU.
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
TOKEN_ROWS = Dataset.from_list(ragged_rows(12))
TEXT_ROWS = Dataset.from_dict(
    {
        "prompt": [f"{letter} " + "word of " * (number % 3) + "the=" for number, letter in enumerate("abcdefghijkl")],
        "completion": ["yes", "no, never", "a", "perhaps not"] * 3,
    }
)
# Adam divides by the root of the squared gradient, which hides a wrong scale unless adam_epsilon is large.
STEPS = {"max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3}


def four_bits(double=True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def suspect(tmp_path_factory):
    """The folder of a tiny Llama in float32."""
    folder = tmp_path_factory.mktemp("suspect")
    tiny_llama(**SHAPE).save_pretrained(folder)
    return folder


def quantised(folder, double=True):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=four_bits(double), dtype=torch.float32)


def dequantised(model):
    """An ordinary float32 Llama with the values of the 4-bit weights."""
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    values = weights_of(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            values[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    twin = LlamaForCausalLM(LlamaConfig(**settings))
    twin.load_state_dict(values)
    return twin


def lora(**kwargs):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs)


def build(kind, folder, model, peft_config=None, eval_dataset=None, **kwargs):
    if kind == "crow":
        args = crow_args(folder, **kwargs)
        return CrowTrainer(model, args, TOKEN_ROWS, eval_dataset, peft_config=peft_config)
    settings = crow_args(folder).to_dict() | {"num_views": 12, "label_weight": 0.5, "warmup_steps": 0} | kwargs
    return InvarianceTrainer(model, InvarianceConfig(**settings), TEXT_ROWS, ByT5Tokenizer(extra_ids=0), peft_config)


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[number] for number in range(4)])


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def far_apart(found, wanted):
    """The largest distance between tensors of the same name, relative to the norm of the expected one."""
    assert found.keys() == wanted.keys() and found
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in found)


def log_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


TRAINERS = ["crow", "invariance"]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", TRAINERS)
def test_loss_and_gradients_equal_those_of_the_dequantised_model(kind, double, suspect, tmp_path):
    """Fails if gradients end at the 4-bit weights, in the attack or in training, after a pass of the suspect."""
    model = quantised(suspect, double)
    results = []
    for each in (dequantised(model), model):
        trainer = build(kind, tmp_path, each, lora(init_lora_weights=False))
        for _ in range(2):
            trainer.model.train().zero_grad()
            loss = trainer.compute_loss(trainer.model, batch_of(trainer))
            loss.backward()
        results.append((loss.item(), {name: value.grad for name, value in trainable(trainer.model).items()}))
    (wanted, gradients), (found, found_gradients) = results
    assert all("lora_" in name and value.any() for name, value in gradients.items())
    assert found == pytest.approx(wanted, rel=1e-5)
    assert far_apart(found_gradients, gradients) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_training_equals_that_of_the_dequantised_model(kind, checkpointing, suspect, tmp_path):
    model = quantised(suspect)
    runs = []
    for each in (dequantised(model), model):
        trainer = build(kind, tmp_path, each, lora(), activation_checkpointing=checkpointing, **STEPS)
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        assert all(torch.equal(after[name], before[name]) for name in after if "lora_" not in name)
        runs.append(trainer)
    wanted, found = runs
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in log_of(found)] == pytest.approx(
            [entry[name] for entry in log_of(wanted)], rel=1e-5
        )
    assert far_apart(trainable(found.model), trainable(wanted.model)) < 1e-4


def test_evaluation_in_between_changes_nothing(suspect, tmp_path):
    """Fails if evaluation packs the weights for inference, after which most of the gradient is lost."""
    runs = []
    for settings in ({}, {"eval_dataset": TOKEN_ROWS, "eval_strategy": "steps", "eval_steps": 1}):
        trainer = build("crow", tmp_path, quantised(suspect), lora(), **STEPS, **settings)
        trainer.train()
        runs.append(weights_of(trainer.model))
    assert same_weights(*runs)


def test_weights_packed_for_inference_are_refused(suspect, tmp_path):
    """A CPU with bfloat16 leaves packed weights after evaluation. Setting the flag imitates that on other machines."""
    model = quantised(suspect)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="Load the model again"):
        build("crow", tmp_path, model, lora())


def test_the_adapter_of_a_quantised_suspect_is_trained_on(suspect, tmp_path):
    """The suspect is a copy with 4-bit weights. It gives the same answers at first and stays unchanged."""
    model = get_peft_model(quantised(suspect), lora(init_lora_weights=False))
    trainer = build("invariance", tmp_path, model, keep=0.0, label_weight=0.0, **STEPS)
    before = weights_of(trainer._suspect)
    assert same_weights(before, weights_of(trainer.model))
    trainer.train()
    assert same_weights(before, weights_of(trainer._suspect))
    assert not any(torch.equal(value, before[name]) for name, value in trainable(trainer.model).items())
    assert log_of(trainer)[0]["distillation"] == pytest.approx(0, abs=1e-5)


def test_the_adapter_alone_is_saved(suspect, tmp_path):
    """Only the adapter is saved. It can be merged into the original weights, which are not rounded."""
    trainer = build("crow", tmp_path, quantised(suspect), lora(), **STEPS)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert [file.name for file in (tmp_path / "saved").glob("*.safetensors")] == ["adapter_model.safetensors"]
    again = load_causal_lm(tmp_path / "saved", quantization_config=four_bits())
    assert same_weights(weights_of(again), weights_of(trainer.model))
    merged = load_causal_lm(tmp_path / "saved").merge_and_unload()
    whole = LlamaForCausalLM.from_pretrained(suspect)
    trained = dict(trainer.model.named_modules())
    for name, module in whole.named_modules():
        if "proj" in name:
            learned = trained[f"base_model.model.{name}"].get_delta_weight("default")
            torch.testing.assert_close(merged.get_submodule(name).weight, module.weight + learned)


def test_two_processes_equal_one(tmp_path):
    """Two processes give the results of one, as in test_sharding.py."""
    equality = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "equality.py"))
    cells = [("llama", kind, "qlora") for kind in ("crow", "invariance")]
    for cell, found in zip(cells, equality["compare"]("ddp", cells, tmp_path), strict=True):
        assert found["processes"] == 2
        assert max(found[name] for name in ("loss", "grad_norm", "weights")) < 1e-5, (cell, found)
        logs = json.loads((tmp_path / "one" / "-".join(cell) / "result.json").read_text())["log"]
        assert len(logs) == 3 and logs[0]["loss"] != pytest.approx(logs[2]["loss"], rel=1e-3)


def test_purify_looks_at_the_suspect_first(suspect, tmp_path):
    """Fails if screening packs the weights for inference, so that nothing can be trained afterwards."""
    settings = {"num_views": 48, "num_canaries": 0, "num_written_rows": 0, "warmup_steps": 0}
    settings |= {"use_cpu": True, "report_to": "none"}
    args, tokenizer = InvarianceConfig(str(tmp_path / "out"), **settings), ByT5Tokenizer(extra_ids=0)
    purification = purify(
        quantised(suspect), TEXT_ROWS, "strong", args, processing_class=tokenizer, peft_config=lora()
    )
    assert any(value.any() for name, value in trainable(purification.model).items() if "lora_B" in name)


def test_the_command_keeps_the_adapter(suspect, tmp_path):
    """Fails if the adapter is merged into 4-bit weights, which would mostly round it away."""
    ByT5Tokenizer(extra_ids=0).save_pretrained(suspect)
    TEXT_ROWS.to_json(tmp_path / "clean.jsonl")
    bits = json.dumps({"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}})
    command = ["purify", "--model", str(suspect), "--dataset", str(tmp_path / "clean.jsonl"), "--output_dir"]
    command += [str(tmp_path / "out"), "--model_init_kwargs", bits]
    command += "--lora --num_views 16 --num_canaries 0 --num_written_rows 0 --use_cpu --report_to none".split()
    assert main(command) in (0, None)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    command[2], command[6] = str(tmp_path / "out"), str(tmp_path / "again")
    assert main(command) == 1
