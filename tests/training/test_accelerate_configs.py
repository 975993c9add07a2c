"""Tests that accelerate reads the configurations in examples/accelerate/ as they are meant."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
WANTED = {
    "multi_gpu.yaml": ("MULTI_GPU", 1, {}),
    "multi_node.yaml": ("MULTI_GPU", 2, {}),
    "fsdp2.yaml": ("FSDP", 1, {"fsdp_version": 2, "fsdp_activation_checkpointing": False}),
    "deepspeed_zero2.yaml": ("DEEPSPEED", 1, {"zero_stage": 2}),
    "deepspeed_zero3.yaml": ("DEEPSPEED", 1, {"zero_stage": 3, "zero3_save_16bit_model": True}),
}


def test_every_configuration_is_tested():
    assert {path.name for path in FOLDER.iterdir()} == set(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_accelerate_reads_it(name):
    """Fails if accelerate does not know a key, or rejects or drops a value because of its type."""
    kind, machines, details = WANTED[name]
    config = load_config_from_file(str(FOLDER / name))
    assert (config.distributed_type.value, config.num_machines, config.mixed_precision) == (kind, machines, "no")
    read = {**(getattr(config, "fsdp_config", None) or {}), **(getattr(config, "deepspeed_config", None) or {})}
    assert details.items() <= read.items()
    written = yaml.safe_load((FOLDER / name).read_text())
    assert written.keys() <= vars(config).keys()


@pytest.mark.parametrize("name", [name for name in WANTED if "deepspeed" not in name])
def test_accelerate_launches_by_it(name):
    """
    Checks what `accelerate launch` makes of the file. It reads the DeepSpeed files only if DeepSpeed is installed.
    """
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(FOLDER / name), "--num_processes", "4", "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert (arguments.use_fsdp, arguments.num_processes) == (name == "fsdp2.yaml", 4)
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2 and not arguments.fsdp_activation_checkpointing
