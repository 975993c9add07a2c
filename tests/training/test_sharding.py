"""Tests that several processes give the result of one, in real runs of two CPU processes (gloo).

`accelerate launch` starts the processes. `benchmarks/equality.py` has the runner and makes the table of all cells. The
tests check a few of them.
"""

import json
import random
import runpy
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin, is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

from crow_hf import CrowTrainer, load_causal_lm
from crow_hf.training import recorder as recorder_module
from crow_hf.training.recorder import recorder_of
from crow_hf.training.sharding import are_finite, is_sharded, num_parameters
from helpers.coconut import batch_of, coconut
from helpers.tiny import crow_args, ragged_rows, same_weights, tiny_llama


EQUALITY = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "equality.py"))
CELLS = {
    "ddp": [("llama", "crow", "full"), ("llama", "purify", "lora"), ("thoughts", "crow", "full")],
    # Includes an adapter in the layers over bytes, which stay gathered between two passes, and a sharded suspect.
    "fsdp2": [("llama", "crow", "checkpointing"), ("llama", "invariance", "full"), ("coconut", "invariance", "lora")],
}


@pytest.mark.parametrize("setup", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_equal_one(setup, tmp_path):
    """
    Fails if the loss is a mean of the processes' means, if a step has other rows, if gradients are not summed, if
    sharding freezes an adapter, if the suspect is not gathered again, if processes draw different thoughts, or if only
    one process implants canaries.
    """
    for cell, found in zip(CELLS[setup], EQUALITY["compare"](setup, CELLS[setup], tmp_path), strict=True):
        assert (found["processes"], found["in_shards"]) == (2, setup == "fsdp2"), cell
        assert max(found[name] for name in ("loss", "grad_norm", "weights")) < 1e-5, (cell, found)
        logs = json.loads((tmp_path / "one" / "-".join(cell) / "result.json").read_text())["log"]
        assert len(logs) == 3 and logs[0]["loss"] != pytest.approx(logs[2]["loss"], rel=1e-3)


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
ZERO = [pytest.param(setup, marks=needs_deepspeed) for setup in EQUALITY["DEEPSPEED"]]


@pytest.mark.slow
@pytest.mark.parametrize("setup", [*CELLS, *ZERO])
def test_bfloat16_in_two_processes_is_near_one(setup, tmp_path):
    """Fails if terms or gradients are summed in half precision. The sign of a gradient near 0 depends on rounding."""
    cells = [("llama", "crow", "bf16"), ("llama", "invariance", "bf16")]
    for cell, found in zip(cells, EQUALITY["compare"](setup, cells, tmp_path), strict=True):
        assert found["loss"] < 0.02 and found["grad_norm"] < 0.1, (cell, found)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ZERO)
def test_two_processes_of_deepspeed_equal_one(setup, tmp_path):
    """
    Fails if a step ends with the first of two backward passes, if a gradient exists in only one process, if weights
    are released before a pass is differentiated, or if the suspect's weights are mixed in with another sharding.
    """
    cells = [("llama", "crow", "full"), ("llama", "invariance", "full"), ("coconut", "invariance", "lora")]
    cells += [("thoughts", "crow", "full")] if setup == "zero2" else [("coconut", "crow", "checkpointing")]
    for cell, found in zip(cells, EQUALITY["compare"](setup, cells, tmp_path), strict=True):
        in_shards = setup == "zero3"
        assert (found["processes"], found["type"], found["in_shards"]) == (2, "DEEPSPEED", in_shards), cell
        assert max(found[name] for name in ("loss", "grad_norm", "weights")) < 1e-5, (cell, found)


# Each line of the file `steps` is a finished step. A killed run resumes from its last complete checkpoint.
KILLED = """
import os, runpy, sys
from pathlib import Path
from accelerate import PartialState
from transformers import TrainerCallback
from crow_hf import CoconutTokenizer, CrowConfig, CrowTrainer, InvarianceConfig, InvarianceTrainer

_, equality, setup, kind, folder = sys.argv
EQUALITY = runpy.run_path(equality)
EQUALITY["prepare"](setup)

class Count(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 0:
            with open(Path(folder, "steps"), "a") as file:
                file.write("step\\n")

settings = EQUALITY["COMMON"] | EQUALITY["IN_PARTS"] | {"max_steps": 24, "save_strategy": "steps", "save_steps": 1}
model, rows, tokenizer = EQUALITY["tiny_model"]("llama"), EQUALITY["rows_of"]("llama"), CoconutTokenizer()
if kind == "crow":
    trainer = CrowTrainer(model, CrowConfig(folder, **settings), rows, processing_class=tokenizer)
else:
    settings = EQUALITY["INVARIANCE"] | settings | {"num_views": 96}
    trainer = InvarianceTrainer(model, InvarianceConfig(folder, **settings), rows, tokenizer)
trainer.add_callback(Count())
trainer.train(resume_from_checkpoint=Path(folder, "steps").exists())
assert trainer.accelerator.num_processes == 2
trainer.save_model(str(Path(folder, "whole")))
PartialState().wait_for_everyone()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crow", "invariance"])
@pytest.mark.parametrize("setup", [*CELLS, *ZERO])
def test_two_processes_killed_at_random_moments_lose_nothing(setup, kind, tmp_path):
    """
    Fails if a checkpoint counts as complete before all processes have written it, or if shards are put together
    wrongly.
    """
    (tmp_path / "run.py").write_text(KILLED)
    rng = random.Random(f"{setup} {kind}")

    def start(folder):
        folder.mkdir(exist_ok=True)
        command, environment = EQUALITY["launcher"](setup)
        command += [str(tmp_path / "run.py"), EQUALITY["__file__"], setup, kind, str(folder)]
        with open(folder / "said", "w") as said:
            return subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    def steps(folder):
        return len((folder / "steps").read_text().split()) if (folder / "steps").exists() else 0

    whole, killed = tmp_path / "never stopped", tmp_path / "killed"
    assert start(whole).wait() == 0, (whole / "said").read_text()
    for _ in range(8):
        # After two steps, the checkpoint of the first is complete.
        process, wanted = start(killed), max(2, steps(killed) + rng.randint(1, 2))
        while process.poll() is None and steps(killed) < wanted:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, (killed / "said").read_text()
        # The launcher starts its workers in their own sessions.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()
    assert start(killed).wait() == 0, (killed / "said").read_text()
    weights = [load_file(folder / "whole" / "model.safetensors") for folder in (whole, killed)]
    assert same_weights(*weights)


# Refusals. A single process cannot shard, so these tests set the state that accelerate would be in.


def check(model, plugin, tmp_path):
    trainer = CrowTrainer(model, crow_args(tmp_path), Dataset.from_list(ragged_rows(4)))
    trainer.is_fsdp_enabled, trainer.accelerator.state.fsdp_plugin = True, plugin
    try:
        trainer._check_setup()
    finally:
        del trainer.accelerator.state.fsdp_plugin


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version: 2"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "fsdp_activation_checkpointing: false"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_configurations_that_would_be_wrong_are_refused(settings, message, tmp_path):
    """Version 1 of FSDP, recomputation with other dropout, and a patching model that is never loaded are refused."""
    with pytest.raises(ValueError, match=message):
        check(coconut(), FullyShardedDataParallelPlugin(**settings), tmp_path)


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_layers_are_not_compiled_there(backend, tmp_path):
    """FSDP gathers weights with hooks. With DeepSpeed, compiled layers gave other thoughts."""
    trainer = CrowTrainer(
        tiny_llama(), crow_args(tmp_path, torch_compile_backend="aot_eager"), Dataset.from_list(ragged_rows(4))
    )
    setattr(trainer, f"is_{backend}_enabled", True)
    with pytest.raises(ValueError, match="torch_compile"):
        trainer._check_setup()


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.int8])
def test_weights_of_any_dtype_can_be_checked(dtype):
    model = nn.ParameterList([nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)])
    assert are_finite(model)
    if dtype.is_floating_point:
        model[0].data = torch.tensor([1, float("nan"), 2]).to(dtype)
        assert not are_finite(model)


def zero3(monkeypatch, **details):
    """Configure ZeRO-3 for this process, as far as that is possible without DeepSpeed."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3} | details})
    monkeypatch.setattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    return config


def test_zero3_that_would_save_nothing_is_refused(tmp_path, monkeypatch):
    """Fails if training ends with a DeepSpeed checkpoint instead of a model."""
    trainer = CrowTrainer(tiny_llama(), crow_args(tmp_path), Dataset.from_list(ragged_rows(4)))
    saves = "stage3_gather_16bit_weights_on_model_save"
    config = zero3(monkeypatch, **{saves: False})
    plugin = SimpleNamespace(hf_ds_config=config)
    trainer.accelerator.state = SimpleNamespace(deepspeed_plugin=plugin, dynamo_plugin=TorchDynamoPlugin())
    with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
        trainer._check_setup()
    config.config["zero_optimization"][saves] = True
    trainer._check_setup()
    trainer.model.model.norm.weight.ds_tensor = trainer.model.model.norm.weight.data
    with pytest.raises(ValueError, match="load_causal_lm"):
        trainer._check_setup()


def test_a_suspect_is_loaded_whole_under_zero3(tmp_path, monkeypatch):
    """Fails if the weights are empty, as transformers loads them once there are training arguments."""
    tiny_llama().save_pretrained(tmp_path)
    zero3(monkeypatch)
    model = load_causal_lm(tmp_path)
    assert not is_sharded(model) and model.num_parameters() == tiny_llama().num_parameters()
    assert is_deepspeed_zero3_enabled()


def test_what_a_process_has_of_weights_in_shards():
    """
    Fails if a sharded model counts no parameters, or if a NaN in a shard is overlooked because the parameter itself is
    empty.
    """
    model = tiny_llama()
    whole = num_parameters(model)
    assert (whole, is_sharded(model), are_finite(model)) == (model.num_parameters(), False, True)
    for weight in model.parameters():
        weight.ds_numel, weight.ds_tensor = weight.numel(), weight.data[:1].clone()
        weight.data = torch.empty(0)
    assert (num_parameters(model), is_sharded(model), are_finite(model)) == (whole, True, True)
    model.lm_head.weight.ds_tensor[0, 0] = float("nan")
    assert not are_finite(model)


def test_evaluation_before_a_training_by_deepspeed_is_refused(tmp_path):
    """
    Fails if evaluation creates an inference engine in place of the training engine, or ends in a configuration error.
    """
    rows = Dataset.from_list(ragged_rows(4))
    trainer = CrowTrainer(tiny_llama(), crow_args(tmp_path), rows, eval_dataset=rows)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="eval_on_start"):
        trainer.evaluate()


def test_any_decoder_can_be_loaded_by_one_process(tmp_path):
    check(tiny_llama(), FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True), tmp_path)


def test_an_adapter_is_not_merged_into_shards(tmp_path, monkeypatch):
    """Fails if the suspect is saved as the purified model. Merging leaves sharded weights unchanged."""
    rows = Dataset.from_list(ragged_rows(4))
    trainer = CrowTrainer(tiny_llama(), crow_args(tmp_path), rows, peft_config=LoraConfig(target_modules="all-linear"))
    trainer.model = trainer.model.merge_and_unload()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="sharded weights"):
        trainer.save_model()


def test_compilation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend` is refused, although no training argument shows it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ValueError, match="dynamo_backend"):
            CrowTrainer(tiny_llama(), crow_args(tmp_path), Dataset.from_list(ragged_rows(4)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_thoughts_in_shards_are_refused(monkeypatch):
    """
    Without the refusal, processes would wait for each other forever. The number of passes depends on the thoughts in
    their rows.
    """
    recorder = recorder_of(coconut())
    monkeypatch.setattr(recorder_module, "is_sharded", lambda layer: True)
    with pytest.raises(ValueError, match="Use DDP"):
        recorder.prepare(batch_of(["a<bot><latent><eot>b"]))
    assert "patch_lengths" in recorder.prepare(batch_of(["no thoughts"]))


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    """The threads of DataParallel share one model, and so the hooks on it."""
    args = crow_args(tmp_path)
    trainer = CrowTrainer(tiny_llama(), args, Dataset.from_list(ragged_rows(4)))
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(ValueError, match="DataParallel"):
        trainer._check_setup()


def test_what_patches_is_hidden_while_a_model_is_taken_apart():
    """
    Fails if the predictor is sharded, since it runs while the shards are not gathered, or if it is missing afterwards.
    """
    model = coconut()
    names = {name for name, _ in model.named_parameters()}
    predictor = {name for name in names if "entropy_predictor" in name}
    with recorder_of(model).frozen_modules_hidden(torch.device("cpu")):
        assert {name for name, _ in model.named_parameters()} == names - predictor
    assert predictor and {name for name, _ in model.named_parameters()} == names
