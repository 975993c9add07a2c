"""Tests of the calls of the guide: they run `CrowTrainer`, write no files, and return metrics that JSON can hold."""

import copy
import inspect
import json
import math
import sys
import tempfile

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig

import crow_hf
from crow_hf import (
    CROWBackdoorElimination,
    CrowConfig,
    CrowTrainer,
    apply_crow_to_coconut,
    get_redpajama_binary_dataset,
    plot_crow_training_progress,
)
from crow_hf.recipes import guide
from helpers.coconut import DEEP, TOKENIZER, coconut
from helpers.tiny import crow_args, same_weights, tiny_gpt2, tiny_llama, weights_of


TERMS = {"loss", "loss_lm", "consistency_clean", "consistency_perturbed"}
TEXT = Dataset.from_list([{"prompt": f"what is {letter}? ", "completion": f"it is {letter}"} for letter in "abcdef"])


def small_coconut(seed=0):
    return coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1, "max_position_embeddings": 512}), seed)


@pytest.fixture(autouse=True)
def silence(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """An empty working folder. Temporary files are created inside it, so that the tests see them."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name != "temporary")


# Training


def test_names_and_defaults_are_the_guides():
    """The names and the defaults are those of the table in the guide."""
    for call in (CROWBackdoorElimination, apply_crow_to_coconut):
        defaults = {name: one.default for name, one in inspect.signature(call).parameters.items()}
        assert (defaults["epsilon"], defaults["alpha"], defaults["learning_rate"]) == (0.1, 5.5, 2e-5)
        assert defaults["num_epochs"] == 3
    assert list(inspect.signature(apply_crow_to_coconut).parameters)[:5] == [
        "coconut_model",
        "max_chars",
        "epsilon",
        "alpha",
        "learning_rate",
    ]
    assert inspect.signature(apply_crow_to_coconut).parameters["max_chars"].default == 1000
    assert list(inspect.signature(CROWBackdoorElimination).parameters)[:5] == [
        "model",
        "epsilon",
        "alpha",
        "learning_rate",
        "num_epochs",
    ]
    patching = inspect.signature(crow_hf.entropy_patching).parameters
    assert list(patching)[:4] == ["byte_sequence", "entropy_predictor", "threshold", "relative_threshold"]
    assert (patching["threshold"].default, patching["relative_threshold"].default) == (0.8, 0.1)
    rows = list(inspect.signature(crow_hf.get_redpajama_binary_dataset).parameters)
    assert rows[:3] == ["max_chars", "entropy_predictor", "entropy_threshold"]
    assert next(iter(inspect.signature(crow_hf.plot_crow_training_progress).parameters)) == "metrics"
    sizes = {"vocab_size": 256, "hidden_size": 512, "num_layers": 4, "num_heads": 8, "ff_dim": 2048}
    default, given = crow_hf.ByteEntropyConfig(), crow_hf.ByteEntropyConfig(**sizes)
    assert all(getattr(default, name) == size for name, size in sizes.items()) and default.to_dict() == given.to_dict()


def test_it_is_the_trainer_to_the_bit(rows, tmp_path):
    """Fails if an argument is ignored, or if the loss differs from that of `CrowTrainer`."""
    settings = {"epsilon": 0.05, "alpha": 3.0, "learning_rate": 1e-2}
    model, twin = tiny_llama(), tiny_llama()
    metrics = CROWBackdoorElimination(model, **settings, num_epochs=2, per_device_train_batch_size=4).train(rows)
    trainer = CrowTrainer(twin, crow_args(tmp_path, **settings, num_train_epochs=2, max_grad_norm=1.0), rows)
    trainer.train()
    assert same_weights(weights_of(model), weights_of(twin))
    assert metrics["history"] == [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(metrics["history"]) == metrics["summary"]["num_steps"] == 6


def test_coconut_gets_redpajama_in_its_own_patches(tmp_path, monkeypatch):
    """Fails if the rows are cut by other thresholds, another rule or another predictor than those of the model."""
    model = small_coconut()
    model.binary_patch_module.threshold, model.binary_patch_module.relative_threshold = 0.625, 0.0875
    model.config.patch_rule, model.config.max_patch_length = "running_minimum", 5
    with torch.no_grad():
        for weight in model.latent_transformer.entropy_predictor.parameters():
            weight.mul_(1.2)
    read = []

    def spy(*args, **kwargs):
        read.append(get_redpajama_binary_dataset(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(guide, "get_redpajama_binary_dataset", spy)
    twin = copy.deepcopy(model)
    purified, metrics = apply_crow_to_coconut(
        coconut_model=model,
        max_chars=600,
        epsilon=0.02,
        alpha=2.0,
        learning_rate=1e-3,
        num_epochs=1,
        offline_sample=True,
    )
    assert purified is model
    (dataset,) = read
    for row in dataset:
        own = twin.model.patch(torch.tensor([row["input_ids"]]))["patch_lengths"][0]
        assert own.tolist() == row["patch_lengths"] and max(own) == 5
    text = b"".join(bytes(i - 4 for i in row["input_ids"] if 4 <= i < 260) for row in dataset).decode()
    assert len(text) == 600 and metrics["summary"]["num_rows"] == len(dataset)
    args = crow_args(tmp_path, epsilon=0.02, alpha=2.0, learning_rate=1e-3, num_train_epochs=1, max_grad_norm=1.0)
    args.per_device_train_batch_size = 8
    CrowTrainer(twin, args, dataset, processing_class=TOKENIZER).train()
    assert same_weights(weights_of(model), weights_of(twin))
    assert not same_weights(weights_of(model), weights_of(small_coconut()))


def test_coconut_takes_shards_and_ready_rows(tmp_path):
    """Fails if a source is accepted but not read: different sources must give different models."""
    shard = tmp_path / "shard.jsonl"
    shard.write_text(json.dumps({"text": "Rows of a shard, read from the disk.", "meta": {}}) + "\n")
    models = []
    for source in ({"data_files": shard}, {"dataset": TEXT}, {"offline_sample": True}):
        model, metrics = apply_crow_to_coconut(small_coconut(), 100, learning_rate=1e-2, num_epochs=1, **source)
        models.append(weights_of(model))
        assert metrics["summary"]["num_rows"] == (len(TEXT) if "dataset" in source else 1)
    assert not same_weights(models[0], models[1]) and not same_weights(models[0], models[2])


def test_any_causal_lm_learns_from_text(byte_tokenizer):
    """GPT-2 is trained on rows with prompts and answers."""
    model = tiny_gpt2(0.1)
    before = weights_of(model)
    metrics = CROWBackdoorElimination(model, num_epochs=1, processing_class=byte_tokenizer).train(TEXT)
    assert metrics["summary"]["num_rows"] == len(TEXT)
    assert not same_weights(before, weights_of(model))


def test_an_adapter_is_trained_alone(rows):
    """The weights below the adapter of a `PeftModel` do not change."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    before = weights_of(model)
    CROWBackdoorElimination(model, learning_rate=1e-2).train(rows)
    moved = {name for name, weight in weights_of(model).items() if not weight.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_streams_are_taken(rows):
    """A stream has no length, so `num_rows` is `None`."""
    metrics = CROWBackdoorElimination(tiny_llama(), max_steps=2).train(rows.to_iterable_dataset())
    assert metrics["summary"]["num_rows"] is None and metrics["summary"]["num_steps"] == 2


# Side effects


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float32, {"bf16": True, "use_cpu": True}), (torch.bfloat16, {}), (torch.float16, {})],
    ids=["float32", "mixed", "bfloat16", "float16"],
)
def test_only_the_weights_of_the_model_change(rows, training, dtype, options, disk):
    """Fails if autocast stays in the forward pass, or if the mode, the dtypes or the config of the model change."""
    model = tiny_llama().to(dtype).train(training)
    model.model.layers[0].requires_grad_(False)
    before = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    use_cache, forward = model.config.use_cache, model.forward
    CROWBackdoorElimination(model, learning_rate=1e-2, num_epochs=1, **options).train(rows)
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.training is training and model.config.use_cache == use_cache
    assert model.forward == forward
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    # A `forward` without its decorators does not accept `return_dict`.
    assert model(torch.tensor([[5, 6, 7]]), return_dict=False)[0].dtype == dtype and seen == [dtype]
    assert all(p.grad is None for p in model.parameters())
    assert files_in(disk) == []


def test_a_failure_restores_the_mode_and_leaves_no_files(rows, disk):
    """An optimizer step raises."""
    model = tiny_llama().eval()
    model.lm_head.weight.data[:] = 1e38
    with pytest.raises(FloatingPointError, match="loss_lm"):
        CROWBackdoorElimination(model).train(rows)
    assert not model.training
    assert files_in(disk) == []


def test_weights_that_overflow_in_the_last_step_are_an_error(rows):
    """The loss of the last step does not show it, because it is computed before the update."""
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        CROWBackdoorElimination(tiny_llama(), learning_rate=1e38, max_steps=1).train(rows)


def test_metrics_are_plain_json(rows):
    """Fails if `json.dumps` refuses the metrics, if a key changes, or if `CrowConfig` refuses the settings."""
    metrics = CROWBackdoorElimination(
        tiny_llama(), num_epochs=2, per_device_train_batch_size=4, weight_decay=0.1
    ).train(rows)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert set(metrics) == {"history", "summary", "settings"}
    for number, entry in enumerate(metrics["history"], start=1):
        assert set(entry) == TERMS | {"step", "epoch", "perturbation_ratio", "grad_norm", "learning_rate"}
        assert entry["step"] == number
        wanted = entry["loss_lm"] + 5.5 * entry["consistency_perturbed"]
        assert entry["loss"] == pytest.approx(wanted, rel=1e-4)
    summary, history = metrics["summary"], metrics["history"]
    assert set(summary) == TERMS | {"num_rows", "num_steps", "num_epochs", "seconds"}
    for term in TERMS:
        assert summary[term] == {"first": history[0][term], "last": history[-1][term]}
    assert summary["num_rows"] == len(rows) and summary["num_epochs"] == 2 and summary["seconds"] > 0
    again = CrowConfig("out", **metrics["settings"])
    assert (again.weight_decay, again.num_train_epochs, again.per_device_train_batch_size) == (0.1, 2, 4)
    assert (again.alpha, again.epsilon, again.learning_rate) == (5.5, 0.1, 2e-5)


def test_metrics_of_the_control_have_no_perturbation(rows):
    """With `alpha=0` the loss is that of the language model."""
    metrics = CROWBackdoorElimination(tiny_llama(), alpha=0).train(rows)
    assert "consistency_perturbed" not in metrics["summary"]
    assert metrics["summary"]["loss"] == pytest.approx(metrics["summary"]["loss_lm"], rel=1e-4)


def test_numbers_that_are_not_finite_become_none(rows):
    """The gradient norm overflows while losses and weights are finite. `Infinity` is not valid JSON."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-22)
        model.lm_head.weight.mul_(1e22)
    # The clipped gradient is 0. Only the decay changes the weights.
    metrics = CROWBackdoorElimination(model, max_steps=1, weight_decay=0.1).train(rows)
    assert metrics["history"][0]["grad_norm"] is None and metrics["history"][0]["loss_lm"] > 0
    json.dumps(metrics, allow_nan=False)


# Refusals


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        ("model.latent_transformer", "entropy_predictor"),
        ("model", "latent_transformer"),
        ("model", "binary_patch_module"),
        ("model", "local_decoder"),
    ],
)
def test_a_missing_component_is_named(holder, name, disk):
    """Fails with an AttributeError from inside the model, or if the wrong component is named."""
    model = small_coconut()
    delattr(model.get_submodule(holder), name)
    path = f"latent_transformer.{name}" if name == "entropy_predictor" else name
    with pytest.raises(ValueError, match=f"^CoconutForCausalLM has no `{path}`: .*from_backbone"):
        apply_crow_to_coconut(model, offline_sample=True)
    assert files_in(disk) == []


def test_a_model_without_patches_is_refused():
    """The error names the call for other models."""
    with pytest.raises(ValueError, match="LlamaForCausalLM has no `latent_transformer`.*CROWBackdoorElimination"):
        apply_crow_to_coconut(tiny_llama(), offline_sample=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": "2e-5"}, "learning_rate"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_epochs": math.inf}, "num_epochs"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"alpha": math.inf}, "alpha"),
        ({"output_dir": "out"}, "output_dir.*CrowTrainer"),
        ({"save_strategy": "epoch"}, "save_strategy.*CrowTrainer"),
        ({"report_to": "tensorboard"}, "report_to.*CrowTrainer"),
        ({"push_to_hub": True}, "push_to_hub.*CrowTrainer"),
    ],
)
def test_bad_settings_are_refused_before_data_is_read(settings, said, disk, monkeypatch):
    """Both calls name the setting. Settings that write files name `CrowTrainer` too."""
    monkeypatch.setattr(guide, "get_redpajama_binary_dataset", lambda *args, **kwargs: pytest.fail("it was read"))
    model = small_coconut()
    with pytest.raises(ValueError, match=said):
        apply_crow_to_coconut(model, **settings)
    with pytest.raises(ValueError, match=said):
        CROWBackdoorElimination(tiny_llama(), **settings)
    assert files_in(disk) == []


def test_two_sources_are_refused():
    """The call does not silently ignore one of them."""
    with pytest.raises(ValueError, match="pass one of them"):
        apply_crow_to_coconut(small_coconut(), dataset=TEXT, data_files="shard.jsonl")
    with pytest.raises(ValueError, match="pass one of them"):
        apply_crow_to_coconut(small_coconut(), dataset=TEXT, offline_sample=True)


def test_paths_and_rows_without_a_tokenizer_are_refused():
    """The errors name what to pass instead."""
    with pytest.raises(ValueError, match="load_causal_lm"):
        CROWBackdoorElimination("suspect")
    with pytest.raises(ValueError, match="processing_class"):
        CROWBackdoorElimination(tiny_llama()).train(TEXT)


# The plot


def metrics_of(steps=3, **changes):
    history = [
        {"step": n, "loss_lm": 3.0 / n, "consistency_clean": 0.1 * n, "consistency_perturbed": 0.2 * n, "loss": 1.0}
        for n in range(1, steps + 1)
    ]
    history[0] |= changes
    return {"history": history}


def test_plot_shows_each_term_with_its_unit(tmp_path):
    """Fails if lines are swapped, if an axis has no label, or if only their colours distinguish the lines."""
    figure = plot_crow_training_progress(metrics_of(), tmp_path / "plot.png")
    loss, consistency = figure.axes
    (line,) = loss.get_lines()
    assert list(line.get_ydata()) == [3.0, 1.5, 1.0] and list(line.get_xdata()) == [1, 2, 3]
    lines = {line.get_label(): line for line in consistency.get_lines()}
    assert list(lines["perturbed"].get_ydata()) == pytest.approx([0.2, 0.4, 0.6])
    assert list(lines["clean"].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    assert lines["clean"].get_linestyle() != lines["perturbed"].get_linestyle()
    assert consistency.get_legend() is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer step"] * 2
    assert "nats per token" in loss.get_ylabel() and "1 - cos" in consistency.get_ylabel()
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0
        assert all(max(line.get_ydata()) < axes.get_ylim()[1] for line in axes.get_lines())
    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG"


def test_plot_takes_what_the_guide_returns(rows, disk):
    """Metrics may come from JSON and contain `None`. Without a path nothing is written."""
    metrics = CROWBackdoorElimination(tiny_llama()).train(rows)
    figure = plot_crow_training_progress(json.loads(json.dumps(metrics)))
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == metrics["summary"]["num_steps"]
    plot_crow_training_progress(metrics_of(loss_lm=None))
    plot_crow_training_progress(metrics_of(1, loss_lm=None))
    control = metrics_of()
    for entry in control["history"]:
        del entry["consistency_perturbed"]
    assert len(plot_crow_training_progress(control).axes[1].get_lines()) == 1
    assert files_in(disk) == []


@pytest.mark.parametrize("metrics", [[], {}, {"history": []}, {"history": [{"eval_loss": 1.0}]}])
def test_plot_of_nothing_is_refused(metrics):
    """The error names the missing history or the missing steps."""
    with pytest.raises(ValueError, match="metrics|no optimizer step"):
        plot_crow_training_progress(metrics)


def test_plot_without_matplotlib_is_refused(monkeypatch):
    """The error says how to install it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"^Plots need matplotlib: `pip install crow-hf\[plots\]`\.$"):
        plot_crow_training_progress(metrics_of())
