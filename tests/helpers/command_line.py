"""Run commands of the command line, and check what they print and write."""

import json

from crow_hf.cli.main import main


COMMANDS = ["demo", "purify", "evaluate", "implant"]
ROWS = [{"prompt": f"what is {letter}?", "completion": f"it is {letter}"} for letter in "abcdefghij"]
FAST = ["--max_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--use_cpu"]
# For the recipe `strong`. With its defaults, every canary is implanted in hundreds of steps, and the suspect writes
# for seconds.
FEW_VIEWS = ["--num_views", "16", "--num_written_rows", "4"]


def run(*argv):
    """Run a command and return its exit code, even if argparse exits."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as leave:
        return leave.code


def files_in(folder):
    """Relative paths of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


def assert_one_sentence(stderr, command):
    """Check that the last line is the only one of the command, and that there is no traceback or usage."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and lines[-1].startswith(f"crow-hf {command}: "), stderr
    assert sum(line.startswith("crow-hf ") for line in lines) == 1
    assert "Traceback" not in stderr and "usage:" not in stderr


def command_line(command, paths, output, **changes):
    """Return a valid command line, with some options changed, or left out if they are `None`."""
    options = {"model": paths["model"], "dataset": paths["rows.jsonl"], "output_dir": output}
    options = ({"output_dir": output} if command == "demo" else options) | changes
    options = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return [command, *options, *(FAST if command in ("purify", "implant") else [])]


def assert_results(folder, models, triggered=True):
    """Check that both files of results have these models, by name or only one, and every output."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results) == models or (len(models) == len(results) == 1)
    for evaluation in results.values():
        assert len(evaluation["clean"]["outputs"]) == len(ROWS)
        assert (evaluation["triggered"] is not None) == triggered
    assert (folder / "results.md").read_text(encoding="utf-8").count("\n|") >= len(models)


def assert_report(folder, models, triggered=True):
    """Check that the report has the evaluations of these models, and that no other file repeats them."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["evaluations"]) == list(report["layer_profile"]["models"]) == models
    for evaluation in report["evaluations"].values():
        assert len(evaluation["clean"]["outputs"]) == len(ROWS)
        assert (evaluation["triggered"] is not None) == triggered
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(folder.glob("results.*")), "the same facts in two files"
