"""Tests of inputs and setups that CrowTrainer refuses, and of weights that it never saves or overwrites."""

import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainerCallback

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.methods.crow import trainer as trainer_module
from helpers.crow import BATCH, build, column, lora
from helpers.invariance import invariance_trainer
from helpers.oracles import assert_equals_oracle
from helpers.tiny import crow_args, same_weights, tiny_gpt2, weights_of


class At(TrainerCallback):
    """Runs `action(model)` at one event of one optimizer step, counted from 1."""

    def __init__(self, event, step, action):
        def handler(args, state, control, model, **kwargs):
            if state.global_step == step - 1:
                action(model)

        setattr(self, event, handler)


def poison(name):
    """Write one NaN into the parameter called `name`."""

    def action(model):
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[0] = float("nan")

    return action


# Models from disk


def test_model_path(tmp_path, rows, tiny_llama):
    tiny_llama(seed=5).save_pretrained(tmp_path / "model")
    trainer = build(tmp_path, str(tmp_path / "model"), rows, max_steps=1, model_init_kwargs={"dtype": "float32"})
    assert same_weights(weights_of(trainer.model), weights_of(tiny_llama(seed=5)))
    trainer.train()


def test_model_init_kwargs_are_used(tmp_path, rows, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "model")
    trainer = build(tmp_path, str(tmp_path / "model"), rows, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16


def test_pickled_weights_are_refused(tmp_path, rows, tiny_llama):
    """A pickle can run code, and the models are suspects."""
    model, path = tiny_llama(), tmp_path / "model"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        build(tmp_path, str(path), rows)


# Checkpoints and non-finite numbers


def trainer_dir(trainer):
    return Path(trainer.args.output_dir)


def checkpoints(trainer):
    return sorted(path.name for path in trainer_dir(trainer).glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["full", "dropout", "lora"])
def test_resume_equals_an_uninterrupted_run(kind, tmp_path, rows, tiny_llama):
    """The weights are bit-identical, which includes the optimizer's moments and the random state."""

    def fresh(directory):
        model = tiny_gpt2(0.2) if kind == "dropout" else tiny_llama()
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        peft_config = lora() if kind == "lora" else None
        return build(directory, model, rows, peft_config=peft_config, per_device_train_batch_size=2, **settings)

    whole = fresh(tmp_path)
    whole.train()
    resumed = fresh(tmp_path)
    resumed.train(resume_from_checkpoint=str(trainer_dir(whole) / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert column(whole, "loss") == column(resumed, "loss")


def test_earlier_checkpoints_are_not_overwritten(tmp_path, rows, tiny_llama):
    """train() refuses before it changes any file, and resuming is allowed."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path, tiny_llama(), rows, **settings).train()
    again = build(tmp_path, tiny_llama(), rows, **(settings | {"max_steps": 3}))
    saved = {path: path.stat().st_mtime_ns for path in trainer_dir(again).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        again.train()
    assert saved == {path: path.stat().st_mtime_ns for path in saved}
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


@pytest.mark.parametrize("filtered", [True, False])
def test_non_finite_loss_names_term_and_step(filtered, tmp_path, rows, tiny_llama):
    """A NaN in the head, in step 3, affects only the language-model term. The Trainer's filter must not hide it."""
    trainer = build(
        tmp_path,
        tiny_llama(),
        rows,
        callbacks=[At("on_step_begin", 3, poison("lm_head.weight"))],
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        logging_nan_inf_filter=filtered,
    )
    with pytest.raises(FloatingPointError, match="loss_lm") as error:
        trainer.train()
    assert "3" in re.findall(r"\d+", str(error.value))
    assert "consistency" not in str(error.value).split("loss_lm")[0]
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]
    for name in checkpoints(trainer):
        model = LlamaForCausalLM.from_pretrained(trainer_dir(trainer) / name)
        assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def test_non_finite_consistency_is_named(tmp_path, rows, tiny_llama):
    """An epsilon beyond float32 affects only the perturbed pass."""
    with pytest.raises(FloatingPointError, match="consistency_perturbed"):
        build(tmp_path, tiny_llama(), rows, epsilon=1e39, max_steps=1).train()


def test_non_finite_weights_are_not_saved_as_checkpoint(tmp_path, rows, tiny_llama):
    """A step with a finite loss breaks the weights. The checkpoint before it stays the last one."""
    callback = At("on_optimizer_step", 2, poison("model.layers.1.mlp.up_proj.weight"))
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, tiny_llama(), rows, callbacks=[callback], **settings)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert list(trainer_dir(trainer).rglob("*.safetensors")) == [
        trainer_dir(trainer) / "checkpoint-1" / "model.safetensors"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("peft", [False, True])
def test_save_model_refuses_non_finite_weights(peft, value, tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora() if peft else None)
    with torch.no_grad():
        next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).view(-1)[-1] = value
    with pytest.raises(FloatingPointError):
        trainer.save_model(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))


# Bad inputs


@pytest.mark.parametrize("layers", [1, 2])
def test_too_few_layers(layers, tmp_path, rows, tiny_llama):
    with pytest.raises(ValueError, match="layers"):
        build(tmp_path, tiny_llama(num_hidden_layers=layers), rows)


def test_three_layers_are_enough(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(num_hidden_layers=3), rows, consistency_layers="reference")
    assert_equals_oracle(trainer, BATCH, layers="reference")


def test_encoder_decoder(tmp_path, rows):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    with pytest.raises(ValueError, match="(?i)decoder"):
        build(tmp_path, T5ForConditionalGeneration(config), rows)


@pytest.mark.parametrize(
    "dataset",
    [None, Dataset.from_dict({"input_ids": []}), Dataset.from_dict({"question": ["x"], "reply": ["y"]})],
    ids=["missing", "empty", "unusable"],
)
def test_bad_train_dataset(dataset, tmp_path, byte_tokenizer, tiny_llama):
    with pytest.raises(ValueError):
        CrowTrainer(tiny_llama(), crow_args(tmp_path), train_dataset=dataset, processing_class=byte_tokenizer)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_ids_without_an_embedding(column, tmp_path, tiny_llama):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], column: [5, 999]}])
    with pytest.raises(ValueError, match="The rows have the token id 999"):
        build(tmp_path, tiny_llama(), rows)


# Refusals and warnings before training


def test_folder_with_a_model_is_not_overwritten(tmp_path, rows, tiny_llama):
    """Covers `CrowConfig("suspect")` together with `CrowTrainer("suspect")`."""
    tiny_llama().save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="Choose another `output_dir`"):
        build(tmp_path, str(tmp_path / "run"), rows).train()


def test_adapter_inside_a_plain_model(tmp_path, rows, tiny_llama):
    """Fails if a new adapter of the same name replaces the suspect's adapter, and the backdoor with it."""
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="load_causal_lm"):
        build(tmp_path, model, rows, peft_config=LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize(("alpha", "modules"), [(5.5, ["lm_head"]), (0.0, ["lm_head"]), (5.5, ["lm_head", "q_proj"])])
def test_the_head_alone_is_refused(alpha, modules, tmp_path, rows, tiny_llama):
    """The consistency loss has no gradient then. Plain fine-tuning, without it, works."""
    args = crow_args(tmp_path / "out", alpha=alpha, max_steps=1)
    if alpha and modules == ["lm_head"]:
        with pytest.raises(ValueError, match="Only the output head is trainable"):
            CrowTrainer(tiny_llama(), args, rows, peft_config=LoraConfig(target_modules=modules))
        return
    CrowTrainer(tiny_llama(), args, rows, peft_config=LoraConfig(target_modules=modules)).train()


def test_half_precision_weights_are_pointed_out(tmp_path, rows, tiny_llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    build(tmp_path, tiny_llama().bfloat16(), rows)
    assert "half precision" in caplog.text


@pytest.mark.parametrize("kind", ["crow", "invariance"])
def test_a_refused_setup_costs_no_tokenization(kind, tmp_path, rows, tiny_llama, monkeypatch):
    """Fails if rows are tokenized before the setup is checked, or if a refused setup leaves an output folder."""

    def fail(*args, **kwargs):
        pytest.fail("Rows were prepared before the setup was checked.")

    monkeypatch.setattr(trainer_module, "prepare_dataset", fail)
    monkeypatch.setattr(Dataset, "map", fail)
    monkeypatch.setattr(CrowConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="DataParallel"):
        if kind == "crow":
            build(tmp_path, tiny_llama(), rows, eval_dataset=rows)
        else:
            invariance_trainer(tmp_path, tiny_llama())
    assert not (tmp_path / "run").exists()


def test_refused_rows_leave_no_output_folder(tmp_path, byte_tokenizer, tiny_llama):
    """Fails if rows are checked only after the Trainer has created its folder and its repository on the Hub."""
    rows = Dataset.from_dict({"question": ["x"], "reply": ["y"]})
    with pytest.raises(ValueError, match="columns"):
        CrowTrainer(tiny_llama(), crow_args(tmp_path), train_dataset=rows, processing_class=byte_tokenizer)
    assert not (tmp_path / "run").exists()
