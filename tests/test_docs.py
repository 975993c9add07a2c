"""Runs every example of README.md and docs/ on tiny models, and checks what the pages name.

Each page gets a folder with the files that it names (`suspect`, `clean.jsonl` and so on). Its blocks run there in
order.

- `python` blocks share one namespace. Those of the API reference are doctests, each for itself, and their output must
  be as shown.
- `bash` blocks run line by line. `crow-hf`, `python` and `accelerate launch` run in this process, through the
  functions that the real commands call. A test of its own starts `accelerate launch` with two processes.
- `make` and `pip` lines are read and not run. So are blocks marked `slow` (as in "```bash slow"), which must say how
  long they take. The targets, extras, arguments, files and names in them must exist.

To save time, a patch of `TrainingArguments.__post_init__` cuts every training to two steps on the CPU with few views
and one canary. The demo and the arena have few rows and tiny models, and the models soon produce their end-of-sequence
token. RedPajama on the Hub is a local file, and `loopback_hub.py` is the Hub. Nothing else is patched, so a renamed
function, argument, option or file fails here.
"""

import doctest
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from peft import get_peft_model
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import crow_hf
from crow_hf import demo
from crow_hf.arena import attacks, subjects
from crow_hf.arena.defences import METHODS
from crow_hf.cli.arguments import options_of_command, parse_arguments
from crow_hf.cli.main import main
from crow_hf.cli.options import COMMANDS
from crow_hf.patching import redpajama
from crow_hf.recipes.presets import lora_config
from crow_hf.reporting.gate import Policy
from helpers.coconut import coconut
from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.tiny import tiny_llama


ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
MAKE_REFERENCE = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
MAKE_PICTURE = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))


@dataclass
class Block:
    page: str
    line: int
    info: str
    code: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def is_slow(self) -> bool:
        return self.info.split()[1:] == ["slow"]


def blocks_of(page: str) -> list[Block]:
    blocks, lines, fence = [], [], None
    for number, line in enumerate(PAGES[page].splitlines(), 1):
        if line.lstrip().startswith("```"):
            if fence is None:
                fence, lines = (number, line.strip()[3:]), []
            else:
                blocks.append(Block(page, *fence, "\n".join(lines) + "\n"))
                fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{page}:{fence} is not closed"
    return blocks


def prose_of(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
WITH_CODE = sorted({block.page for block in BLOCKS if block.language != "text"})


# The files that the pages name, and the shortcuts.


def save_model(folder: Path, seed: int) -> None:
    model = tiny_llama(seed, vocab_size=259, num_hidden_layers=3, max_position_embeddings=512)
    with torch.no_grad():
        # About half of all generated tokens end the answer.
        model.lm_head.weight[model.config.eos_token_id] *= 5
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("suspect", "clean-model", "decoder")):
        save_model(folder / name, seed)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "suspect"), lora_config())
    adapted.peft_config["default"].base_model_name_or_path = "suspect"
    adapted.save_pretrained(folder / "purified-adapter")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "purified-adapter")
    coconut().save_pretrained(folder / "coconut")
    crow_hf.CoconutTokenizer().save_pretrained(folder / "coconut")
    for name, letters in {"clean": "abcdef", "test": "mnop"}.items():
        rows = [{"prompt": f"what is {letter} {letter}?\n", "completion": f"it is {letter}"} for letter in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in PAGES["README.md"].splitlines() if len(line) > 40]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    # The file on the Hub.
    shutil.copy(folder / "text.jsonl", folder / "c4_sample.jsonl")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def place(files, hub, tmp_path, monkeypatch) -> Path:
    """A folder of its own with these files, and the shortcuts."""
    shutil.copytree(files, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    # The client of the Hub read its settings when it was imported.
    settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    complete = TrainingArguments.__post_init__

    def cut_short(self) -> None:
        self.max_steps, self.use_cpu, self.disable_tqdm, self.report_to = 2, True, True, "none"
        if isinstance(self, crow_hf.InvarianceConfig):
            self.num_views, self.num_canaries = min(self.num_views, 32), min(self.num_canaries, 1)
            self.num_written_rows = min(self.num_written_rows, 2)
        complete(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", cut_short)

    monkeypatch.setattr(redpajama, "_hub_file", lambda source: f"{source}_sample.jsonl")
    for name, count in {"IMPLANT_ROWS": 16, "SELECTION_ROWS": 4, "TEST_ROWS": 4, "SCRATCH_ROWS": 8}.items():
        monkeypatch.setattr(attacks, name, count)
    for name, subject in subjects.SUBJECTS.items():
        tiny = subjects.Subject(name, tiny_subject, num_rows=16, rows=subject.rows)
        monkeypatch.setitem(subjects.SUBJECTS, name, tiny)
    monkeypatch.setattr(attacks, "ATTACKS", attacks.ATTACKS.copy())
    every_row = demo.demo_rows
    monkeypatch.setattr(demo, "demo_rows", lambda count, *args, **kwargs: every_row(min(count, 6), *args, **kwargs))
    return tmp_path / "place"


def tiny_subject():
    tokenizer = crow_hf.CoconutTokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=3, max_position_embeddings=256, **ids)


# Running


def run_python(block: Block, namespace: dict) -> None:
    code = compile("\n" * block.line + block.code, str(ROOT / block.page), "exec")
    if not block.is_slow:
        exec(code, namespace)


class WhatIsShown(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def run_doctest(block: Block, namespace: dict) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, namespace, block.page, block.page, block.line)
    messages = []
    runner = doctest.DocTestRunner(WhatIsShown(), verbose=False)
    runner.run(test, out=messages.append, clear_globs=False)
    assert not runner.failures, "".join(messages)


def commands_of(block: Block) -> Iterator[list[str]]:
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_bash(block: Block, monkeypatch) -> None:
    for program, *words in commands_of(block):
        where = f"{block.page}:{block.line}: {program} {shlex.join(words)}"
        if block.is_slow or program in ("make", "pip"):
            read_command(program, words)
        elif program == "crow-hf":
            # Two steps on a tiny model meet no policy.
            read_command(program, words)
            # A report names the command that wrote it.
            monkeypatch.setattr(sys, "argv", [program, *words])
            assert main(words) == 0 or words[0] == "gate", where
        elif program == "python":
            run_script(words, monkeypatch)
        elif program == "accelerate":
            assert words.pop(0) == "launch", where
            launched = launch_command_parser().parse_args(words)
            if launched.module:
                assert launched.training_script == "crow_hf" and main(launched.training_script_args) == 0, where
            else:
                run_script([launched.training_script, *launched.training_script_args], monkeypatch)
        else:
            pytest.fail(f"{where}: this test does not know how to run {program}")


def run_script(words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")


def read_command(program: str, words: list[str]) -> None:
    """Check a command without running it."""
    if program == "crow-hf":
        arguments = parse_arguments(words[0], words[1:])
        if words[0] == "arena":
            for given, known in ((arguments[0].attacks, attacks.ATTACKS), (arguments[0].methods, METHODS)):
                assert given is None or set(given.split(",")) <= set(known)
    elif program == "make":
        make = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert make.returncode == 0, make.stderr
        for line in re.sub(r"\$\(.*?\)", "", make.stdout).splitlines():
            if (called := shlex.split(line)) and called[0].endswith("/crow-hf"):
                read_command("crow-hf", called[1:])
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    else:
        pytest.fail(f"this test does not know how to read {program}")


def names_in_docstrings(page: str) -> dict:
    """Return the names that the examples of the API reference use without defining them."""
    names = {name: getattr(crow_hf, name) for name in crow_hf.__all__} | {"torch": torch, "LlamaConfig": LlamaConfig}
    clean_rows = datasets.load_dataset("json", data_files="clean.jsonl", split="train")
    names |= {"clean_rows": clean_rows, "test_rows": clean_rows, "rows": clean_rows}
    names["dataset"] = datasets.load_dataset("json", data_files="text.jsonl", split="train")
    names["args"] = crow_hf.CrowConfig("out-of-docstrings")
    terms = dict.fromkeys(("loss", "loss_lm", "consistency_clean", "consistency_perturbed"), 1.0)
    names["metrics"] = {"history": [{"step": 1, **terms}]}
    if page == "docs/reference/coconut.md":
        names["rows"] = crow_hf.reachability_rows(4, seed=0)
    folder = "coconut" if page == "docs/reference/purify.md" else "suspect"
    names["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    names["model"] = crow_hf.load_causal_lm(folder, is_trainable=True)
    return names


@pytest.mark.parametrize("page", [page for page in WITH_CODE if "/reference/" not in page])
def test_examples_run(page, place, monkeypatch):
    """Fails if a page uses an old name of a function, an argument, an option or a file."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash":
            run_bash(block, monkeypatch)


@pytest.mark.parametrize("page", [page for page in WITH_CODE if "/reference/" in page])
def test_examples_of_docstrings_run(page, place, monkeypatch):
    """Fails if an example does not print what it shows. Each example starts in a fresh folder."""
    for number, block in enumerate(blocks_of(page)):
        if block.language == "python":
            shutil.copytree(place, place.parent / str(number), symlinks=True)
            monkeypatch.chdir(place.parent / str(number))
            run_doctest(block, names_in_docstrings(page))


@pytest.mark.parametrize(
    ("number", "few", "folder"),
    [
        (0, ["--num_canaries", "0", "--num_written_rows", "0"], "purified"),
        pytest.param(1, [], "purified-by-script", marks=pytest.mark.slow),
    ],
)
def test_accelerate_launches_two_processes(number, few, folder, place):
    """The first command and the first script on the page about several GPUs run in two processes."""
    block = [block for block in blocks_of("docs/purify-on-several-gpus.md") if block.language == "bash"][number]
    program, launch, *words = next(commands_of(block))
    assert (program, launch, words[:2]) == ("accelerate", "launch", ["--num_processes", "4"])
    # With `--cpu` alone, accelerate starts a single process.
    on_two_cores = ["--multi_gpu", "--num_processes", "2", *words[2:]]
    few = [*few, "--max_steps", "1", "--warmup_steps", "0", "--use_cpu", "--disable_tqdm", "true"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*launcher, *on_two_cores, *few], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("The purified model is in purified") == (number == 0)
    crow_hf.load_causal_lm(folder)


# Reading


@pytest.mark.parametrize("name", ["action.yml", "workflow.yml"])
def test_commands_of_the_example_of_a_pipeline_exist(name):
    """Fails if an option has another name, or if a variable of the action is not set."""
    found = yaml.safe_load((ROOT / "examples" / "gate" / name).read_text(encoding="utf-8"))
    (job,) = [found["runs"]] if name == "action.yml" else found["jobs"].values()
    for step in job["steps"]:
        program, *words = shlex.split(step.get("run", "")) or ["nothing"]
        variables = {word.removeprefix("$") for word in words if word.startswith("$")}
        assert variables == step.get("env", {}).keys()
        if program == "crow-hf":
            read_command(program, words)
    Policy.read(ROOT / "examples" / "gate" / "policy.yaml")


def test_every_block_has_a_language_that_is_tested():
    """Fails if a mistyped language or mark hides a block from these tests."""
    for block in BLOCKS:
        assert block.language in ("python", "bash", "text"), f"{block.page}:{block.line}"
        assert block.info in (block.language, f"{block.language} slow"), f"{block.page}:{block.line}"


def test_slow_blocks_say_what_they_take():
    """Fails if a block that takes long does not say so."""
    slow = [block for block in BLOCKS if block.is_slow]
    assert slow
    for block in slow:
        assert re.search(r"# takes (some minutes|hours)", block.code), f"{block.page}:{block.line}"


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Fails if a linked page or heading was moved or renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors_of(PAGES[file.resolve().relative_to(ROOT).as_posix()]), (
                f"{page} links to {target}"
            )


def test_every_page_can_be_found():
    """Fails if no page links to a page."""
    linked = set()
    for page in PAGES:
        targets = re.findall(r"\]\(([^)\s#]+)", prose_of(page))
        linked |= {((ROOT / page).parent / target).resolve() for target in targets if "://" not in target}
    assert {ROOT / page for page in PAGES} <= linked


def known_options() -> set[str]:
    """Return the options of all commands, and those of `accelerate launch`."""
    options = {action for each in launch_command_parser()._actions for action in each.option_strings}
    # The configuration of the default recipe has the arguments of both methods.
    options |= {f"--{name}" for command in COMMANDS for name in options_of_command(command)}
    return options | {"--config", "--help", "--help_all", "--verbose", "--version"}


@pytest.mark.parametrize("page", PAGES)
def test_what_the_prose_names_exists(page):
    """Fails if running text uses an old name of an option, a command, a file, a module or a public name."""
    options, words = known_options(), re.findall(r"`([^`\n]+)`", prose_of(page))
    for word in words:
        program, *rest = word.split()
        if program in ("make", "pip"):
            read_command(program, rest)
        elif program == "crow-hf" and rest:
            assert rest[0] in COMMANDS, f"{page}: {word}"
        for option in re.findall(r"(?<!\S)--\w+", word):
            assert option in options, f"{page}: {option}"
        if re.fullmatch(r"(crow_hf|tests|docs|examples|benchmarks)/[\w/.-]*", word):
            assert (ROOT / word).exists(), f"{page}: {word}"
        if match := re.fullmatch(r"(crow_hf(?:\.\w+)*)\.(\w+)(\(.*\))?", word):
            assert is_importable(match[1], match[2]), f"{page}: {word}"


def is_importable(module: str, name: str) -> bool:
    """Return whether `name` is a member or a submodule of a module or a class."""
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        try:
            return hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            return is_importable(*module.rsplit(".", 1)) if "." in module else False
    return True


def test_reference_is_that_of_the_docstrings():
    """Fails if a docstring was changed or a public name added without `make docs`."""
    wanted = MAKE_REFERENCE["build"]()
    written = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").iterdir()}
    assert wanted.keys() == written.keys(), "run `make docs`"
    for path, text in wanted.items():
        assert written[path] == text, f"{path.relative_to(ROOT)} differs from the docstrings: run `make docs`"


def test_readme_prints_the_numbers_of_the_results():
    """Fails if README.md or its picture shows other numbers of the real model than docs/results.md."""
    numbers = MAKE_PICTURE["real_model"]()
    assert [attack for attack, _ in numbers.values()] == ["98.0", "24.5", "1.0", "1.5"]
    lines = [line for line in PAGES["README.md"].splitlines() if re.search(r"\| \d\.\d{3} \|$", line)]
    assert len(lines) == len(numbers)
    for line, (attack, bits) in zip(lines, numbers.values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[1], cells[-1]) == (f"{attack} %", bits)


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    """`python docs/make_picture.py` writes a PNG that is 1280 pixels wide, as the one that README.md shows."""
    pytest.importorskip("matplotlib")
    draw = MAKE_PICTURE["draw"]
    monkeypatch.setitem(draw.__globals__, "PICTURE", tmp_path / "picture.png")
    draw()
    for picture in (tmp_path / "picture.png", ROOT / "docs" / "before_after.png"):
        header = picture.read_bytes()[:24]
        assert header[:4] == b"\x89PNG" and int.from_bytes(header[16:20], "big") == 1280
    assert "](docs/before_after.png)" in PAGES["README.md"]
