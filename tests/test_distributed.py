"""Two processes give the gradient of one: run with gloo on the CPU through torch's own launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import crow_args, ragged_rows, tiny_llama
from datasets import Dataset

from crow_hf import CrowTrainer


def train(output_file, **settings):
    """Train three steps on ragged rows; the main process writes the log and the sum of the weights."""
    args = crow_args(Path(output_file).parent, max_steps=3, learning_rate=1e-3, **settings)
    trainer = CrowTrainer(tiny_llama(), args, Dataset.from_list(ragged_rows(16)))
    trainer.train()
    if trainer.is_world_process_zero():
        total = sum(weight.double().sum().item() for weight in trainer.model.parameters())
        result = {"processes": trainer.accelerator.num_processes, "log": trainer.state.log_history, "total": total}
        Path(output_file).write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    # The destructors of a process group of gloo now and then hang, after all the work is done.
    os._exit(0)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}], ids=["crow", "control"])
def test_two_processes_equal_one(settings, tmp_path):
    """Rows of different length on the two ranks: a mean of the ranks' means would be another loss."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    results = {}
    for name, command, split in (
        ("one", [sys.executable], {"per_device_train_batch_size": 8}),
        ("two", launcher, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ):
        (tmp_path / name).mkdir()
        output = tmp_path / name / "result.json"
        call = [*command, __file__, str(output), json.dumps(settings | split)]
        subprocess.run(call, check=True, env=environment, capture_output=True, timeout=120)
        results[name] = json.loads(output.read_text())
    assert (results["one"]["processes"], results["two"]["processes"]) == (1, 2)
    assert results["two"]["total"] == pytest.approx(results["one"]["total"], abs=1e-4)
    for one, two in zip(results["one"]["log"][:3], results["two"]["log"][:3], strict=True):
        for name in set(one) - {"epoch"}:
            # A ratio of norms over a micro-batch has no exact mean over the step.
            assert two[name] == pytest.approx(one[name], rel=1e-2 if name == "perturbation_ratio" else 1e-4), name


if __name__ == "__main__":
    train(sys.argv[1], **json.loads(sys.argv[2]))
