"""Tests of the arguments of CROW training."""

import json

import pytest
import torch
from transformers import HfArgumentParser

from crow_hf import CrowConfig, InvarianceConfig
from helpers.tiny import crow_args


@pytest.mark.parametrize(
    "settings",
    [
        *({name: value} for name in ("alpha", "epsilon") for value in (-0.1, float("nan"), float("inf"))),
        {"epsilon_mode": "sideways"},
        {"consistency_layers": "all"},
        {"label_smoothing_factor": 0.1},
        {"ddp_static_graph": True},
        {"ddp_find_unused_parameters": True},
        {"learning_rate": -1e-3},
        {"num_train_epochs": 0},
        {"weight_decay": -1.0},
        {"neftune_noise_alpha": -1.0},
        {"per_device_train_batch_size": 0},
        {"per_device_train_batch_size": 10**20},
        {"per_device_eval_batch_size": -1},
        {"seed": -1},
        {"data_seed": 2**32},
        {"gradient_accumulation_steps": 0},
        {"model_init_kwargs": "dtype=bfloat16"},
        {"model_init_kwargs": "[1]"},
        {"model_init_kwargs": '{"a":' * 50_000},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_bad_settings(settings, tmp_path):
    """The error names the setting."""
    name = "use_reentrant" if "use_reentrant" in str(settings) else next(iter(settings))
    with pytest.raises(ValueError, match=name):
        crow_args(tmp_path, **settings)


@pytest.mark.parametrize(
    ("optim", "optim_args", "said"),
    [
        ("sgd", "momentum=abc", "could not convert"),
        ("sgd", "momentum", "`name=value` pairs"),
        ("adamw_torch", "beta1=abc", "takes no beta1"),
        ("sgd", "momentum=0.9, beta1=0.5", "takes no beta1 "),
        ("sgd", "momentum=0.0,nesterov=False", None),
        ("galore_adamw", "rank=8", None),
        ("adamw_torch", None, None),
    ],
)
def test_arguments_that_the_optimizer_does_not_take_are_refused(optim, optim_args, said, tmp_path):
    """Fails if an argument is ignored without a word, or if one that equals its default counts as ignored."""
    settings = {"optim": optim, "optim_args": optim_args}
    if said is None:
        assert crow_args(tmp_path, **settings).optim_args == optim_args
    else:
        with pytest.raises(ValueError, match=f"optim_args.*{said}|{said}.*optim_args"):
            crow_args(tmp_path, **settings)


@pytest.mark.parametrize("kind", [CrowConfig, InvarianceConfig])
def test_no_token_is_written_down(kind, tmp_path):
    """Trackers, logs and debuggers show no token, while the run itself still has it."""
    hidden = {"token": "hf_HiddenInHere", "dtype": "float32"}
    config = kind(str(tmp_path), use_cpu=True, hub_token="hf_NobodySeesThis", model_init_kwargs=dict(hidden))
    shown = [
        str(config),
        repr(config),
        config.to_json_string(),
        str(config.to_dict()),
        str(config.to_sanitized_dict()),
    ]
    assert all("float32" in text and "hf_" not in text for text in shown)
    assert config.model_init_kwargs == hidden and config.hub_token == "hf_NobodySeesThis"


def test_memory_is_not_pinned_for_a_cpu(tmp_path, monkeypatch):
    """Fails if PyTorch warns on machines without a GPU, or if a GPU waits for its rows."""
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(CrowConfig, "device", torch.device(device))
        assert CrowConfig(str(tmp_path)).dataloader_pin_memory == (device == "cuda")


def test_defaults_of_the_config(tmp_path):
    config = CrowConfig(output_dir=str(tmp_path), use_cpu=True)
    expected = {
        "alpha": 5.5,
        "epsilon": 0.1,
        "epsilon_mode": "absolute",
        "consistency_layers": "paper",
        "max_length": 1024,
        "model_init_kwargs": None,
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "logging_steps": 1,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("alpha", [0.0, 11.0])
def test_edge_values_are_accepted(alpha, tmp_path):
    config = crow_args(tmp_path, alpha=alpha, epsilon=0.0, activation_checkpointing_kwargs={"use_reentrant": False})
    assert (config.alpha, config.epsilon) == (alpha, 0.0)


SETTINGS = {
    "alpha": 11.0,
    "epsilon": 0.25,
    "epsilon_mode": "relative",
    "consistency_layers": "reference",
    "max_length": 77,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("source", ["arguments", "yaml"])
def test_parser(source, tmp_path):
    settings = SETTINGS | {"output_dir": str(tmp_path), "use_cpu": True}
    parser = HfArgumentParser(CrowConfig)
    if source == "arguments":
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        words += ["--model_init_kwargs", json.dumps({"dtype": "bfloat16"})]
        (config,) = parser.parse_args_into_dataclasses(words)
    else:
        lines = [f"{name}: {value}" for name, value in settings.items()]
        (tmp_path / "crow.yaml").write_text("\n".join([*lines, "model_init_kwargs:", "  dtype: bfloat16"]))
        (config,) = parser.parse_yaml_file(str(tmp_path / "crow.yaml"))
    assert isinstance(config, CrowConfig)
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert config.model_init_kwargs == {"dtype": "bfloat16"}


def test_parser_help_prints(capsys):
    """A literal % in a help text breaks argparse."""
    with pytest.raises(SystemExit):
        HfArgumentParser(CrowConfig).parse_args_into_dataclasses(["--help"])
    assert "--epsilon_mode" in capsys.readouterr().out


def test_parser_refuses_a_bad_choice():
    with pytest.raises((SystemExit, ValueError)):
        HfArgumentParser(CrowConfig).parse_args_into_dataclasses(["--output_dir", "x", "--epsilon_mode", "sideways"])
