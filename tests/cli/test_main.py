"""Tests of the entry point: errors are one sentence, exit codes, Ctrl-C and the version."""

import os
import subprocess
import sys
from types import FunctionType

import pytest

import crow_hf
from crow_hf.cli.commands import evaluate
from crow_hf.cli.options import COMMANDS as ALL_COMMANDS
from helpers.command_line import COMMANDS, FEW_VIEWS, assert_one_sentence, command_line, files_in, run


BAD_DATASETS = ["missing.jsonl", "latin.jsonl", "columns.jsonl", "empty.jsonl"]


@pytest.mark.parametrize("command", COMMANDS[1:])
@pytest.mark.parametrize("dataset", BAD_DATASETS)
def test_bad_rows_are_one_sentence(tmp_path, paths, capsys, command, dataset):
    output = tmp_path / "out"
    path = paths.get(dataset, str(tmp_path / dataset))
    assert run(*command_line(command, paths, output, dataset=path)) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert files_in(output) == []


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        ("demo", {"output_dir": None}, "output_dir"),
        ("purify", {"model": None}, "model"),
        ("purify", {"dataset": None}, "dataset"),
        ("evaluate", {"model": None}, "model"),
        ("evaluate", {"dataset": None}, "dataset"),
        ("implant", {"model": None}, "model"),
        ("purify", {"alpha": "nan"}, "alpha"),
        ("purify", {"alpha": "-1"}, "alpha"),
        ("purify", {"alpha": "much"}, "alpha"),
        ("purify", {"epsilon": "inf"}, "epsilon"),
        ("purify", {"epsilon_mode": "other"}, "epsilon_mode"),
        ("purify", {"no_such_option": "1"}, "no_such_option"),
        ("purify", {"config": "no_such.yaml"}, "no_such.yaml"),
        ("purify", {"trigger": "badnets", "target": "refusal"}, "test_dataset"),
        ("purify", {"max_rows": "-1"}, "max_rows"),
        ("purify", {"resume_from_checkpoint": "no_such_checkpoint"}, "no_such_checkpoint"),
        ("purify", {"lora": "true", "lora_r": "0"}, ""),
        ("evaluate", {"trigger": "badnets"}, "target"),
        ("evaluate", {"trigger": " ", "target": "refusal"}, ""),
        ("evaluate", {"batch_size": "0"}, ""),
        ("evaluate", {"max_new_tokens": "0"}, ""),
        ("evaluate", {"max_new_tokens": "127"}, "max_new_tokens"),
        ("implant", {"rate": "2"}, "rate"),
        ("implant", {"trigger": ""}, ""),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, paths, capsys, monkeypatch, command, changes, said):
    """Fails if an error prints a traceback or the usage, exits with 0, or leaves a file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*command_line(command, paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, command)
    assert said in stderr.strip().splitlines()[-1]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "here") == []


def test_trigger_without_target_is_refused_by_purify(tmp_path, paths, capsys):
    changes = {"trigger": "badnets", "test_dataset": paths["rows.jsonl"]}
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    assert_one_sentence(capsys.readouterr().err, "purify")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("dataset", BAD_DATASETS)
def test_bad_test_rows_fail_before_training(tmp_path, paths, capsys, dataset):
    """Fails if unusable test rows are only found after hours of training."""
    path = paths.get(dataset, str(tmp_path / dataset))
    assert run(*command_line("purify", paths, tmp_path / "out", test_dataset=path)) == 1
    assert_one_sentence(capsys.readouterr().err, "purify")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("command", COMMANDS[1:])
@pytest.mark.parametrize("model", ["pickles", "corrupt", "no tokenizer", "nothing here", "rows.jsonl"])
def test_bad_models_are_one_sentence(tmp_path, paths, capsys, command, model):
    """Pickled, truncated or missing weights, a missing tokenizer, and a name that is no folder are reported."""
    path = paths.get(model, str(tmp_path / model))
    assert run(*command_line(command, paths, tmp_path / "out", model=path)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, command)
    assert "safetensors" in stderr or model != "pickles"
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "suspct"}, "suspct is neither a local folder nor"),
        ({"dataset": "missing.jsonl"}, "There is no file missing.jsonl here."),
        ({"datset": "rows.jsonl"}, "There is no argument --datset: did you mean --dataset?"),
        ({"eval_strategy": "steps"}, "`--eval_strategy`"),
        ({"report_to": "wandb"}, "`--report_to` names a tracker that is not installed"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path, paths, capsys, monkeypatch, changes, said):
    """Fails if the sentence does not name the mistake, or if it only comes after the screening."""
    monkeypatch.setattr("crow_hf.recipes.run.screen_dataset", lambda *args: pytest.fail("The rows are screened."))
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "purify")
    assert said in stderr
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("changes", [{"lora": "true"}, {"recipe": "paper"}])
def test_an_adapter_on_sharded_weights_is_refused_before_training(tmp_path, paths, capsys, monkeypatch, changes):
    """Fails if the run starts. An adapter cannot be merged into sharded weights, so the suspect would be saved."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "purify")
    assert "sharded weights" in stderr
    assert files_in(tmp_path / "out") == []


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_is_a_file_is_refused(tmp_path, paths, capsys, command):
    (tmp_path / "out").write_text("mine")
    assert run(*command_line(command, paths, tmp_path / "out")) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_folder_that_is_not_empty_is_refused(tmp_path, paths, capsys, command):
    """Fails if results are overwritten, or if a folder ends up with files of two models."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert run(*command_line(command, paths, tmp_path / "out")) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert files_in(tmp_path / "out") == ["precious.txt"]


def test_empty_output_folder_is_accepted(tmp_path, paths):
    (tmp_path / "out").mkdir()
    assert run(*command_line("purify", paths, tmp_path / "out"), *FEW_VIEWS) == 0


def test_mistake_in_its_own_process(tmp_path, paths):
    """Fails if a process of its own prints anything but the one line on stderr."""
    argv = [*command_line("purify", paths, tmp_path / "out", model=paths["pickles"])]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "crow_hf", *map(str, argv)], env=env, capture_output=True, text=True
    )
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.strip() and "examples/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("crow-hf purify: "), process.stderr
    assert process.stdout.strip() == ""
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_tells_each_command_in_a_sentence(capsys, argv):
    assert run(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in ALL_COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert line.endswith(".") and 20 < len(line) < 120


@pytest.mark.parametrize(
    ("word", "said"), [("purfy", "'purfy': did you mean purify?"), ("--nonsense", "'--nonsense'. `crow-hf --help`")]
)
def test_unknown_commands_exit_with_2(capsys, word, said):
    assert run(word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crow-hf: There is no command ") and said in line


NEEDED = ["--model", "m", "--dataset", "d", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("code", "argv"),
    [
        (0, ["--version"]),
        (0, ["--help"]),
        (0, []),
        (2, ["purfy"]),
        (0, ["purify", "--help"]),
        (0, ["purify", "--help_all"]),
        (0, ["arena", "--help"]),
        (1, ["purify", "--model", "m"]),
        (1, ["purify", "--datset", "d", *NEEDED]),
        (1, ["purify", "--recipe", "guide", "--num_views", "5", *NEEDED]),
        (1, ["purify", "--alpha", "much", *NEEDED]),
        (1, ["purify", "--recipe", "other", *NEEDED]),
        (1, ["purify", "--config", "no_such.yaml"]),
        (1, ["implant", "--save_strategy", "sometimes", *NEEDED]),
        (1, ["demo"]),
    ],
    ids=str,
)
def test_nothing_heavy_is_imported_for_help_and_mistakes(code, argv):
    """Fails if a mistake in the arguments costs the seconds that PyTorch takes to import."""
    heavy = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")
    script = f"""
import sys
from crow_hf.cli import main
try:
    code = main({argv!r})
except SystemExit as leave:
    code = leave.code
print([name for name in {heavy} if name in sys.modules], code)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == f"[] {code}", process.stderr


def test_version_is_printed(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == crow_hf.__version__


# Python runs a module of this name when it starts. This one prints the settings at the moment of `import torch`.
SPY = """
import os, sys
class Spy:
    def find_spec(self, name, *_):
        if name == "torch":
            print([os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")], file=sys.stderr)
sys.meta_path.insert(0, Spy())
"""


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param({}, ["0", None], id="nothing"),
        pytest.param({"GOMP_SPINCOUNT": "1000"}, ["1000", None], id="spin count", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "active"}, [None, "active"], id="policy", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("way", ["command line", pytest.param("library", marks=pytest.mark.slow)])
def test_idle_threads_of_the_command_line_do_not_spin(way, own, expected, tmp_path):
    """Fails if it is set after PyTorch was imported, if the user's own setting is lost, or if a library sets it."""
    (tmp_path / "sitecustomize.py").write_text(SPY)
    call = {
        "command line": ["-m", "crow_hf", "patch", "--text", "one", "--file", "two"],
        "library": ["-c", "import crow_hf, torch"],
    }
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.run(
        [sys.executable, *call[way]],
        env=env | own | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    expected = expected if way != "library" else [own.get("GOMP_SPINCOUNT"), own.get("OMP_WAIT_POLICY")]
    assert process.stderr.splitlines()[0] == str(expected)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "Stopped by Ctrl-C. Nothing more was written."),
        ("checkpoint-2 is complete.", "checkpoint-2 is complete."),
        ("Continue with resume_from_checkpoint=True.", "Continue with --resume_from_checkpoint true."),
        ("o\x1b[2J", "o␛[2J"),
    ],
)
def test_ctrl_c_exits_with_130(paths, capsys, monkeypatch, message, said):
    """Fails if Ctrl-C prints a traceback, has another exit code, or loses what the trainer says about checkpoints."""

    def stop(*args):
        raise KeyboardInterrupt(message)

    monkeypatch.setattr(evaluate, "load_rows", stop)
    assert run("evaluate", "--model", paths["model"], "--dataset", paths["rows.jsonl"]) == 130
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "evaluate")
    assert said in stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_unforeseen_errors_have_their_class_and_on_request_their_place(paths, monkeypatch, capsys, verbose):
    """Fails if a user sees a traceback that was not asked for, or if a bug cannot be traced."""
    monkeypatch.setattr(evaluate, "load_rows", lambda *args: 1 / 0)
    argv = ["evaluate", "--model", paths["model"], "--dataset", paths["rows.jsonl"]]
    assert run(*argv, *(["--verbose"] if verbose else [])) == 1
    stderr = capsys.readouterr().err
    assert "crow-hf evaluate: ZeroDivisionError: division by zero. Pass --verbose" in stderr.splitlines()[-1]
    assert ("Traceback" in stderr) == verbose


def _unpack(*args):
    one, two = args[:1]


def _refuse(*args):
    raise ValueError("Row 3 is no row.")


@pytest.mark.parametrize(
    ("package", "function", "told"),
    [
        ("crow_hf.data.load", _refuse, "crow-hf evaluate: Row 3 is no row."),
        ("crow_hf.data.load", _unpack, "crow-hf evaluate: ValueError: not enough values to unpack"),
        ("transformers", _unpack, "crow-hf evaluate: not enough values to unpack"),
    ],
)
def test_value_errors_are_sentences_only_if_somebody_raised_them(paths, monkeypatch, capsys, package, function, told):
    """Fails if a slip in a line of the package looks like an error of the user."""
    at_home = FunctionType(function.__code__, {"__name__": package, "ValueError": ValueError})
    monkeypatch.setattr(evaluate, "load_rows", at_home)
    assert run("evaluate", "--model", paths["model"], "--dataset", paths["rows.jsonl"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(told) and ("--verbose" in line) == ("ValueError" in told)


def test_a_panic_of_a_library_is_a_sentence(paths, monkeypatch, capsys):
    """Libraries in Rust, such as tokenizers, raise an error that is no `Exception`."""

    class Panic(BaseException):
        pass

    def panic(*args):
        raise Panic("retry limit in match over")

    monkeypatch.setattr(evaluate, "load_rows", panic)
    assert run("evaluate", "--model", paths["model"], "--dataset", paths["rows.jsonl"]) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "evaluate")
    assert "Panic: retry limit in match over" in stderr


def test_the_process_group_is_left(tmp_path, paths):
    """Fails if threads of the group can run while Python shuts down. They aborted a process after its work."""
    command = ["import torch, sys", "from crow_hf.cli import main", "distributed = torch.distributed"]
    command += ["distributed.init_process_group('gloo', init_method=sys.argv[1], rank=0, world_size=1)"]
    command += ["code = main(sys.argv[2:])", "sys.exit(code or distributed.is_initialized())"]
    store = (tmp_path / "store").as_uri()
    words = command_line("evaluate", paths, None, max_new_tokens=8)
    argv = [sys.executable, "-c", "; ".join(command), store, *map(str, words)]
    process = subprocess.run(argv, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
