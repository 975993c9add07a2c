"""Every example of README.md and docs/ runs, on tiny models.

Each page gets a folder with the files that the pages name (`suspect`, `clean.jsonl` and so on), where its blocks run in order.

- `python` blocks share one namespace. Those of the API reference are doctests, each for itself: what they show must come out.
- `bash` blocks run line by line: `crow-hf`, `python` and `accelerate launch` in this process, through the functions that the
  real commands call; one `accelerate launch` is really started, in two processes, by a test of its own.
- `make` and `pip` lines are read and not run, and so are blocks marked `slow` (as in "```bash slow"), which must say what they
  take: the targets, extras, arguments, files and names in them must exist.

To be quick, a patch of `TrainingArguments.__post_init__` cuts every training to two steps on the CPU, whatever the page says,
with few views and one canary; the demo and the arena have few rows and tiny models; and the models soon say their
end-of-sequence token. RedPajama on the Hub is a file here, and the Hub is that of `loopback_hub.py`. Nothing else is patched: a
function, an argument, an option or a file that is renamed fails here.
"""

import ast
import doctest
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
from accelerate.commands.launch import launch_command_parser
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, TrainingArguments

import crow_hf
from crow_hf import demo, redpajama
from crow_hf.arena import attacks, subjects
from crow_hf.arena.defences import METHODS
from crow_hf.cli.arguments import COMMAND_ARGUMENTS, parse_arguments
from crow_hf.cli.main import COMMANDS, main
from helpers.coconut import coconut
from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.tiny import tiny_llama


ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
MAKE_REFERENCE = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))


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


# The files that the pages name, and what is cut short.


def save_model(folder: Path, seed: int) -> None:
    model = tiny_llama(seed, vocab_size=259, num_hidden_layers=3, max_position_embeddings=512)
    with torch.no_grad():
        # Half of all tokens are the last one of an answer.
        model.lm_head.weight[model.config.eos_token_id] *= 5
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("suspect", "clean-model", "decoder")):
        save_model(folder / name, seed)
    coconut().save_pretrained(folder / "coconut")
    crow_hf.CoconutTokenizer().save_pretrained(folder / "coconut")
    for name, letters in {"clean": "abcdef", "test": "mnop"}.items():
        rows = [{"prompt": f"what is {letter} {letter}?\n", "completion": f"it is {letter}"} for letter in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in PAGES["README.md"].splitlines() if len(line) > 40]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    # What is on the Hub.
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
    """A folder of one's own with these files, and everything cut short."""
    shutil.copytree(files, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    # The client of the Hub has read its settings already.
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
        complete(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", cut_short)

    monkeypatch.setattr(redpajama, "_hub_file", lambda source: f"{source}_sample.jsonl")
    for name, count in {"IMPLANT_ROWS": 16, "SELECTION_ROWS": 4, "TEST_ROWS": 4, "SCRATCH_ROWS": 8}.items():
        monkeypatch.setattr(attacks, name, count)
    for name, subject in subjects.SUBJECTS.items():
        tiny = subjects.Subject(name, tiny_subject, num_rows=16, thoughts=subject.thoughts)
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
            assert main(words) == 0, where
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
    """Check what can be checked of a command without running it."""
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


def what_docstrings_take_as_given(page: str) -> dict:
    """The names in the examples of the API reference that no example defines."""
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
    """A page that shows a function, an argument, an option or a file as it was before it was renamed."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash":
            run_bash(block, monkeypatch)


@pytest.mark.parametrize("page", [page for page in WITH_CODE if "/reference/" in page])
def test_examples_of_docstrings_run(page, place, monkeypatch):
    """An example of a docstring that does not do what it shows; each begins anew."""
    for number, block in enumerate(blocks_of(page)):
        if block.language == "python":
            shutil.copytree(place, place.parent / str(number), symlinks=True)
            monkeypatch.chdir(place.parent / str(number))
            run_doctest(block, what_docstrings_take_as_given(page))


@pytest.mark.parametrize(
    ("number", "few", "folder"), [(0, ["--num_canaries", "0"], "purified"), (1, [], "purified-by-script")]
)
def test_accelerate_launches_two_processes(number, few, folder, place):
    """The first lines of the page on several GPUs, of the command and of a script, which work in one process only."""
    block = [block for block in blocks_of("docs/purify-on-several-gpus.md") if block.language == "bash"][number]
    program, launch, *words = next(commands_of(block))
    assert (program, launch, words[:2]) == ("accelerate", "launch", ["--num_processes", "4"])
    # With `--cpu` alone, accelerate starts one process.
    on_two_cores = ["--multi_gpu", "--num_processes", "2", *words[2:]]
    few = [*few, "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*launcher, *on_two_cores, *few], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("The purified model is in purified") == (number == 0)
    crow_hf.load_causal_lm(folder)


# Reading


def test_every_block_has_a_language_that_is_tested():
    """A block that nobody runs, because its language or its mark is mistyped."""
    for block in BLOCKS:
        assert block.language in ("python", "bash", "text"), f"{block.page}:{block.line}"
        assert block.info in (block.language, f"{block.language} slow"), f"{block.page}:{block.line}"


def test_slow_blocks_say_what_they_take():
    """A reader waits for hours without having been told, or a quick block is marked to have it left out."""
    slow = [block for block in BLOCKS if block.is_slow]
    assert slow
    for block in slow:
        assert re.search(r"# takes (some minutes|hours)", block.code), f"{block.page}:{block.line}"


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A link to a page that was moved, or to a heading that is called otherwise now."""
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
    """A page that no other one links to."""
    linked = set()
    for page in PAGES:
        targets = re.findall(r"\]\(([^)\s#]+)", prose_of(page))
        linked |= {((ROOT / page).parent / target).resolve() for target in targets if "://" not in target}
    assert {ROOT / page for page in PAGES} <= linked


def known_options() -> set[str]:
    """Options of all commands, and those of `accelerate launch`."""
    options = {action for each in launch_command_parser()._actions for action in each.option_strings}
    for types in COMMAND_ARGUMENTS.values():
        options |= {f"--{name}" for each in types for name in each.__dataclass_fields__}
    options |= {f"--{name}" for name in crow_hf.InvarianceConfig.__dataclass_fields__}
    return options | {"--config", "--help", "--version"}


@pytest.mark.parametrize("page", PAGES)
def test_what_the_prose_names_exists(page):
    """An option, a command, a file or a name in running text that is called otherwise now."""
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
        if match := re.fullmatch(r"crow_hf\.(\w+)(\(.*\))?", word):
            assert match[1] in dir(crow_hf) or (ROOT / "crow_hf" / f"{match[1]}.py").exists(), f"{page}: {word}"


def test_reference_is_that_of_the_docstrings():
    """A docstring was changed, or a public name added, without `make docs`."""
    wanted = MAKE_REFERENCE["build"]()
    written = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").iterdir()}
    assert wanted.keys() == written.keys(), "run `make docs`"
    for path, text in wanted.items():
        assert written[path] == text, f"{path.relative_to(ROOT)} is not that of the docstrings: run `make docs`"


# The road that docs/layout.md and CONTRIBUTING.md tell of.


def order_of_modules() -> list[set[str]]:
    """Each line of the table, as the modules it is about."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crow_hf").rglob("*.py")}
    lines = []
    for line in re.findall(r"^\| (`crow_hf/.*?`) \|", PAGES["CONTRIBUTING.md"], re.MULTILINE):
        names = re.findall(r"`(.*?)`", line)
        lines.append(
            {
                module
                for name in names
                for module in modules
                if module == name or module.startswith(name) and name.endswith("/")
            }
        )
    return lines


def test_every_module_has_its_line():
    """A new file that the table of CONTRIBUTING.md does not know, or a line about one that is gone."""
    lines = order_of_modules()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crow_hf").rglob("*.py")}
    assert all(lines)
    assert modules - {"crow_hf/__init__.py", "crow_hf/__main__.py"} == set().union(*lines)
    assert sum(map(len, lines)) == len(set().union(*lines))


def test_a_file_imports_only_from_those_above_it():
    """A way back on the one-way road: a trainer that knows of evaluation, evaluation that knows of the command line."""
    place_of = {module: number for number, line in enumerate(order_of_modules()) for module in line}
    for module, number in place_of.items():
        for imported in imports_of(module):
            assert place_of[imported] <= number, f"{module} imports {imported}"


def imports_of(module: str) -> set[str]:
    """The files of the package that a file needs to be imported: not those inside of functions or for type checkers."""
    found = set()
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (ROOT / module).parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files = [path.with_suffix(".py") for path in [base, *(base / alias.name for alias in node.names)]]
            found |= {file.relative_to(ROOT).as_posix() for file in files if file.is_file()}
    return found
