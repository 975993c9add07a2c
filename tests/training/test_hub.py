"""Tests of the Hub from end to end: the real client pushes to a Hub on this machine, and another process loads it.

Run as a script, this file is the client that pushes. The tests read the results that it writes.
"""

import contextlib
import io
import json
import logging
import pickle
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import ByT5Tokenizer

from crow_hf import CrowConfig, CrowTrainer, load_causal_lm
from crow_hf.cli.main import main
from crow_hf.reporting.model_card import build_model_card
from crow_hf.training import hub
from crow_hf.training.hub import push_folder
from crow_hf.training.loading import load_tokenizer
from crow_hf.training.saves import SIDE_FILES
from helpers.coconut import TOKENIZER, coconut, ids_of
from helpers.loopback_hub import TOKEN, LoopbackHub, Repository
from helpers.tiny import ragged_rows, tiny_llama


QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 4}
ROWS = [{"prompt": f"what is {letter}?", "completion": f"it is {letter}"} for letter in "abcdefgh"]
IDS = list(range(3, 20))
MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {"added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"}


# The client


class Client:
    """Does what a user does, in a folder. `results` holds what only this process can see."""

    def __init__(self, folder):
        self.folder, self.results = Path(folder), {}
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(self):
        for name in (
            "models",
            "while_training",
            "adapter",
            "command_line",
            "old_weights",
            "example",
            "failures",
            "suspects",
        ):
            getattr(self, name)()
        (self.folder / "results.json").write_text(json.dumps(self.results))

    def files(self, name):
        from huggingface_hub import list_repo_files

        return sorted(list_repo_files(name))

    def trainer(self, name, model, peft_config=None, **kwargs):
        args = CrowConfig(str(self.folder / name), hub_model_id=name, **(QUIET | {"learning_rate": 1e-2} | kwargs))
        rows = Dataset.from_list(ragged_rows(8))
        return CrowTrainer(model, args, rows, processing_class=ByT5Tokenizer(extra_ids=0), peft_config=peft_config)

    def cli(self, *argv):
        """Return the exit code of a command and what it prints."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(part) for part in argv])
        sys.stdout.write(out.getvalue() + err.getvalue())
        return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    def purify(self, suspect, name, *options):
        argv = ["--dataset", self.folder / "rows.jsonl", "--output_dir", self.folder / name, "--push_to_hub"]
        argv += ["--hub_model_id", name, "--max_steps", 2, "--learning_rate", 1e-2, "--warmup_steps", 0]
        argv += ["--per_device_train_batch_size", 4, "--use_cpu"]
        return self.cli("purify", "--model", suspect, *argv, *options)

    def models(self):
        model = coconut()
        model.push_to_hub("coconut")
        TOKENIZER.push_to_hub("coconut")
        self.results["coconut"] = model(ids_of("abc")).logits.tolist()
        model.save_pretrained(self.folder / "suspects" / "coconut")
        TOKENIZER.save_pretrained(self.folder / "suspects" / "coconut")
        base = tiny_llama()
        base.push_to_hub("base")
        ByT5Tokenizer(extra_ids=0).push_to_hub("base")
        base.save_pretrained(self.folder / "suspects" / "llama")
        ByT5Tokenizer(extra_ids=0).save_pretrained(self.folder / "suspects" / "llama")
        (self.folder / "suspects" / "llama" / "README.md").write_text("---\nlicense: mit\n---\n")

    def while_training(self):
        for name, strategy in (("trained", "every_save"), ("checkpoints", "checkpoint")):
            options = {"hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
            trainer = self.trainer(name, tiny_llama(), push_to_hub=True, **options)
            trainer.train()
            self.results[f"{name} before the end"] = self.files(f"me/{name}")
            # This pushes too.
            trainer.save_model()
            self.results[name] = trainer.model(torch.tensor([IDS])).logits.tolist()

    def adapter(self):
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = self.trainer("adapter", "me/base", lora, hub_token=TOKEN)
        trainer.train()
        datasets = ["me/rows", str(self.folder / "rows.jsonl")]
        trainer.push_to_hub(card=build_model_card(trainer, language="en", datasets=datasets))
        self.results["adapter"] = trainer.model.eval()(torch.tensor([IDS])).logits.tolist()

    def command_line(self):
        suspect, test = self.folder / "suspects" / "coconut", ["--test_dataset", self.folder / "rows.jsonl"]
        drill = [*test, "--trigger", "badnets", "--target", "refusal", "--max_new_tokens", 2]
        strong = ["--num_views", 8, "--num_canaries", 0, "--num_written_rows", 0, "--keep", 0.3]
        strong += ["--hub_token", TOKEN, "--save_total_limit", 2, *drill]
        self.results["purify"] = self.purify(suspect, "purified", *strong)
        for name in ("purified", "purified/checkpoint-2"):
            self.results[name] = load_causal_lm(self.folder / name)(ids_of("abc")).logits.tolist()

    def old_weights(self):
        for name in ("clean.jsonl", ".env", "metrics.json", "training.png", "train.py", "wandb/config.yaml"):
            (self.folder / "trained" / name).parent.mkdir(exist_ok=True)
            (self.folder / "trained" / name).write_text("private")
        push_folder(self.folder / "adapter", "replaced")
        push_folder(self.folder / "trained", "replaced")
        push_folder(self.folder / "adapter", "branched", revision="purified")

    def example(self):
        sys.argv = ["push_to_hub.py", "--model", str(self.folder / "suspects" / "llama"), "--dataset"]
        sys.argv += [str(self.folder / "rows.jsonl"), "--output_dir", str(self.folder / "example"), "--num_views", "8"]
        sys.argv += ["--num_canaries", "0", "--num_written_rows", "0", "--max_steps", "1", "--warmup_steps", "0"]
        sys.argv += ["--use_cpu", "--license", "apache-2.0"]
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / "push_to_hub.py"), run_name="__main__")

    def failures(self):
        suspect, guide = self.folder / "suspects" / "llama", ["--recipe", "guide"]
        self.results["forbidden"] = self.purify(self.folder / "adapter", "forbidden", "--lora", *guide)
        self.results["broken"] = self.purify(suspect, "broken", *guide)
        test = ["--test_dataset", self.folder / "rows.jsonl", "--max_new_tokens", 2]
        self.results["closed"] = self.purify(suspect, "closed", *test, *guide)
        self.results["pushed in vain"] = self.files("me/forbidden") + self.files("me/broken")
        from huggingface_hub import hf_api

        # No server listens on this port.
        endpoint, hf_api.api.endpoint = hf_api.api.endpoint, "http://127.0.0.1:9"
        trainer = self.trainer("unreachable", tiny_llama(), hub_private_repo=True)
        for attempt in (trainer.push_to_hub, lambda: self.trainer("never", tiny_llama(), push_to_hub=True)):
            with pytest.raises(OSError) as error:
                attempt()
            self.results.setdefault("unreachable", []).append(str(error.value))
        hf_api.api.endpoint = endpoint

    def suspects(self):
        for name, load in (
            ("pickled", load_causal_lm),
            ("pickled-adapter", load_causal_lm),
            ("code", load_causal_lm),
            ("code-adapter", load_causal_lm),
            ("code", load_tokenizer),
        ):
            with pytest.raises(ValueError) as error:
                load(f"me/{name}")
            self.results[f"{load.__name__} {name}"] = str(error.value)


LOADER = """
import sys
sys.modules["crow_hf"] = None
import json, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model, ids):
    return model.eval()(torch.tensor([ids])).logits.tolist()

results = {}
for name in ("coconut", "purified"):
    tokenizer = AutoTokenizer.from_pretrained(f"me/{name}", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(f"me/{name}", trust_remote_code=True)
    results[name] = logits(model, tokenizer("abc").input_ids)
results["module"] = type(model).__module__
try:
    AutoModelForCausalLM.from_pretrained("me/coconut", trust_remote_code=False)
except ValueError as error:
    results["refused"] = str(error)
ids = json.loads(sys.argv[1])
for name in ("trained", "replaced"):
    results[name] = logits(AutoModelForCausalLM.from_pretrained(f"me/{name}"), ids)
results["adapter"] = logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter"), ids)
sys.stdout.write(json.dumps(results))
"""


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def suspicious_repositories(trap):
    """Return repositories that run their code when they are loaded without care."""
    bomb = pickle.dumps(Bomb(trap))
    llama = tiny_llama().config.to_json_string().encode()
    evil = json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    tokenizer = json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    code = {
        "config.json": evil.encode(),
        "tokenizer_config.json": tokenizer.encode(),
        "evil.py": f"open({str(trap)!r}, 'w').close()\n".encode(),
        "model.safetensors": b"",
    }
    return {
        "pickled": {"config.json": llama, "pytorch_model.bin": bomb},
        "pickled-adapter": {
            "adapter_config.json": json.dumps(adapter | {"base_model_name_or_path": "me/base"}).encode(),
            "adapter_model.bin": bomb,
        },
        "code": code,
        "code-adapter": {
            "adapter_config.json": json.dumps(adapter | {"base_model_name_or_path": "me/code"}).encode(),
            "adapter_model.safetensors": b"",
        },
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub and the folder of the client after all pushes, the results of the client, and what it printed."""
    root = tmp_path_factory.mktemp("hub")
    folder, trap = root / "client", root / "trap"
    folder.mkdir()
    with LoopbackHub() as hub:
        for name, files in suspicious_repositories(trap).items():
            hub.repositories[f"me/{name}"] = Repository(files)
        hub.failures |= {("me/forbidden", "commit"): 403, ("me/broken", "commit"): 500, ("me/closed", "create"): 403}
        environment = hub.environment(folder / "home") | {"PYTHONPATH": str(Path(__file__).parents[1])}
        client = run_client([__file__, str(folder)], environment, folder)
        yield World(
            hub, folder, trap, json.loads((folder / "results.json").read_text()), client.stdout + client.stderr
        )


class World:
    def __init__(self, hub, folder, trap, results, printed):
        self.hub, self.folder, self.trap, self.results, self.printed = hub, folder, trap, results, printed

    def files(self, name):
        return self.hub.repositories[f"me/{name}"].files

    def card(self, name):
        return ModelCard(self.files(name)["README.md"].decode())


def run_client(argv, environment, folder):
    process = subprocess.run(
        [sys.executable, *argv], env=environment, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process


@pytest.fixture(scope="module")
def loaded(world):
    """The logits of the pushed models in a process that cannot import this package."""
    environment = world.hub.environment(world.folder.parent / "other home", token=None)
    process = run_client(["-c", LOADER, json.dumps(IDS)], environment, world.folder.parent)
    return json.loads(process.stdout.splitlines()[-1])


# The pushed models


@pytest.mark.parametrize("name", ["coconut", "purified", "trained", "replaced", "adapter"])
def test_loads_where_the_package_is_not_installed(world, loaded, name):
    """Fails if weights of a checkpoint are pushed, if code is missing, or if an old adapter is left in place."""
    pushed = world.results["trained" if name == "replaced" else name]
    torch.testing.assert_close(torch.tensor(loaded[name]), torch.tensor(pushed), rtol=1e-5, atol=1e-5)


def test_the_suspect_is_mixed_in_before_the_push(world):
    """Fails if the pushed model is the last checkpoint. Only then do the tests above compare the right weights."""
    models = [world.results[name] for name in ("coconut", "purified", "purified/checkpoint-2")]
    suspect, purified, checkpoint = map(torch.tensor, models)
    assert not torch.allclose(suspect, purified, atol=1e-3) and not torch.allclose(checkpoint, purified, atol=1e-3)


def test_the_code_of_a_coconut_comes_from_the_hub_and_only_if_trusted(loaded):
    assert loaded["module"].startswith("transformers_modules.me.purified.")
    assert "custom code" in loaded["refused"]


def test_only_the_model_is_pushed(world):
    """Fails if checkpoints, pickles, reports or other files of the folder are pushed."""
    assert (world.folder / "purified" / "report.json").exists()
    assert list((world.folder / "trained").glob("checkpoint-*"))
    for name in ("trained", "replaced"):
        assert MODEL_FILES <= set(world.files(name)) <= MODEL_FILES | TOKENIZER_FILES
    code = {name for name in world.files("purified") if name.endswith(".py")}
    assert {"modeling_coconut.py", "tokenization_coconut.py"} <= code
    assert MODEL_FILES <= set(world.files("purified")) - code <= MODEL_FILES | TOKENIZER_FILES
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(world.files("adapter"))
    assert "model.safetensors" not in world.files("adapter")


def test_a_missing_branch_is_created(world):
    """Fails if the push to a missing branch fails, or if it goes to the main branch."""
    assert "adapter_model.safetensors" in world.hub.repositories["me/branched@purified"].files
    assert not world.files("branched")


def test_checkpoints_are_not_pushed_as_the_model(world):
    """Fails if the Trainer pushes checkpoints as the model, or its arguments, with the token, as a pickle."""
    assert world.results["trained before the end"] == []
    before = world.results["checkpoints before the end"]
    assert before and all(path.startswith("last-checkpoint/") for path in before)
    assert "model.safetensors" in world.files("checkpoints")
    assert not any(
        path.endswith("training_args.bin") for repo in world.hub.repositories.values() for path in repo.files
    )


def test_no_token_anywhere(world):
    """Fails if the token is printed, saved, pushed, or kept with the arguments of a checkpoint."""
    assert len(world.printed) > 1000
    assert TOKEN not in world.printed
    saved = [path for path in world.folder.rglob("*") if path.is_file()]
    assert len(saved) > 50
    assert not [path for path in saved if TOKEN.encode() in path.read_bytes()]
    for repository in world.hub.repositories.values():
        assert not [path for path, data in repository.files.items() if TOKEN.encode() in data]


# The cards


@pytest.mark.parametrize("name", ["purified", "trained", "adapter", "example"])
def test_no_path_of_this_machine_in_a_card(world, name):
    """Fails if a card names a local folder, as the cards of the Trainer and of PEFT do."""
    assert str(world.folder.parent) not in str(world.card(name))


def test_card_of_a_purification_with_a_known_backdoor(world):
    card = world.card("purified")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"crow", "backdoor-removal"} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.license is None
    assert "| Invariance |" in card.text and "Screening: 0 of 8 screened rows" in card.text
    assert "VERDICT: " in card.text and "trigger 'badnets', target 'refusal'" in card.text
    results = json.loads((world.folder / "purified" / "report.json").read_text())["evaluations"]["purified"]
    values = {(each.dataset_config, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert values["triggered", "attack_success_rate"] == results["triggered"]["target"]["rate"]
    assert values["clean", "exact_match"] == results["clean"]["exact_match"]["rate"]
    assert values["clean", "bits_per_byte"] == pytest.approx(results["clean"]["bits_per_byte"])


def test_card_of_an_adapter(world):
    data = world.card("adapter").data
    assert (data.base_model, data.library_name, data.language, data.datasets) == ("me/base", "peft", "en", ["me/rows"])


def test_card_of_a_merged_adapter_names_the_adapter(world):
    """Fails if the card names the base alone, which is not the suspect, or claims to be an adapter."""
    card = ModelCard((world.folder / "forbidden" / "README.md").read_text())
    assert "The local model `adapter`, fine-tuned" in card.text
    assert card.data.base_model is None and card.data.library_name == "transformers"


def test_license_is_the_given_one_or_that_of_the_suspect(world):
    assert world.card("example").data.license == "apache-2.0"
    local = (world.folder / "broken" / "README.md").read_text()
    assert ModelCard(local).data.license == "mit"


# Failures


@pytest.mark.parametrize("file", ["README.md", "chat_template.jinja", "model.safetensors"])
def test_a_file_with_a_secret_is_not_pushed(tmp_path, monkeypatch, file):
    """Fails if the Hub is asked for anything before every file was searched, or if the secret is shown."""
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(f"crow_hf.training.hub.{name}", lambda *args, **kwargs: pytest.fail("pushed"))
    token = "plain words of HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", token)
    for name in ("README.md", "chat_template.jinja"):
        (tmp_path / name).write_text("---\n")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"said": token if "model" in file else "-"})
    if "model" not in file:
        (tmp_path / file).write_text(f"by {token}")
    with pytest.raises(OSError, match=f"because {file} holds what looks like an access token") as told:
        push_folder(tmp_path, "me/secret")
    assert token not in str(told.value)


@pytest.mark.parametrize(("name", "status"), [("forbidden", "403"), ("broken", "500")])
def test_failed_upload_leaves_the_model_and_says_how_to_try_again(world, name, status):
    outcome = world.results[name]
    assert outcome["code"] == 1
    lines = [line for line in outcome["err"].splitlines() if line.startswith("crow-hf purify: ")]
    assert len(lines) == 1 and outcome["err"].strip().endswith(lines[0]) and "Traceback" not in outcome["err"]
    assert f"({status} " in lines[0] and "None" not in lines[0]
    assert f'push_folder("{world.folder / name}", "me/{name}")' in shlex.split(lines[0].rsplit("`", 2)[1])[2]
    assert "The purified model is in" in outcome["out"]
    assert load_causal_lm(world.folder / name) and load_tokenizer(world.folder / name)
    assert (world.folder / name / "report.json").exists()
    assert world.results["pushed in vain"] == []


def test_the_command_to_try_again_works(world):
    """Fails if the printed command does not run, or if it pushes the report with its answers."""
    command = shlex.split(world.results["forbidden"]["err"].rsplit("`", 2)[1])
    environment = world.hub.environment(world.folder.parent / "third home")
    world.hub.failures.pop(("me/forbidden", "commit"))
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], env=environment, check=True, capture_output=True)
    assert MODEL_FILES <= set(world.files("forbidden")) <= MODEL_FILES | TOKENIZER_FILES


def test_wrong_token_shows_before_the_training(world):
    outcome = world.results["closed"]
    assert (
        outcome["code"] == 1
        and "The repository closed cannot be opened on the Hub (403 Forbidden: Not today.)" in outcome["err"]
    )
    assert outcome["err"].count("crow-hf purify: ") == 1
    # The suspect is not measured either.
    assert "Looking at the suspect" not in outcome["err"] and not (world.folder / "closed").exists()


def test_no_connection(world):
    push, start = world.results["unreachable"]
    # The command to try again must not make a private repository public.
    assert '"unreachable", private=True)' in push and "\n" not in push
    assert load_causal_lm(world.folder / "unreachable")
    assert start.startswith("The repository never cannot be opened on the Hub (")


@pytest.mark.parametrize(
    ("suspect", "way"),
    [
        ("load_causal_lm pickled", "Convert them to safetensors"),
        ("load_causal_lm pickled-adapter", "Convert them to safetensors"),
        (
            "load_causal_lm code",
            "me/code needs code of its own, .* `trust_remote_code=True` on a machine you can afford to lose",
        ),
        (
            "load_causal_lm code-adapter",
            "me/code needs code of its own, .* `trust_remote_code=True` on a machine you can afford to lose",
        ),
        ("load_tokenizer code", "The tokenizer of me/code needs code of its own"),
    ],
)
def test_code_of_a_suspect_is_refused_and_the_safe_way_named(world, suspect, way):
    message = world.results[suspect]
    assert re.search(way, message) and "\n" not in message
    assert not world.trap.exists()
    assert not [path for method, path in world.hub.requests if path.endswith((".bin", "evil.py"))]


def test_a_repository_is_opened_once(tmp_path, monkeypatch):
    """Fails if a run that has begun asks for its repository again, or takes another's token for a good one."""
    asked = []

    def create_repo(name, token, **kwargs):
        asked.append((name, token))
        return SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}")

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "_OPEN", set())
    args = CrowConfig(str(tmp_path / "once"), push_to_hub=True, hub_token="hf_one", **QUIET)
    args.hub_model_id = hub.create_repository(args)
    trainer = CrowTrainer(tiny_llama(), args, Dataset.from_list(ragged_rows(8)))
    assert trainer.hub_model_id == "me/once" and asked == [("once", "hf_one")]
    hub.create_repository(args, token="hf_other")
    assert asked[1:] == [("me/once", "hf_other")]


def test_files_beside_the_model_are_pushed(tmp_path, monkeypatch):
    """Fails if a file that is copied from the suspect stays behind, or if a private file of the folder does not."""
    kept = {pattern.replace("*", "base") for pattern in SIDE_FILES}
    for name in {*kept, "rows.jsonl", "report.html", "training_args.bin"}:
        (tmp_path / name).touch()
    pushed = []
    monkeypatch.setattr(hub, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub, "upload_folder", lambda **kwargs: pushed.extend(kwargs["allow_patterns"]))
    push_folder(tmp_path, "me/side")
    assert set(pushed) == kept


# The plain card of a trainer


def card_trainer(tmp_path, is_adapter=False):
    tiny_llama().save_pretrained(tmp_path / "base")
    args = CrowConfig(str(tmp_path / "run"), **QUIET)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if is_adapter else None
    rows = Dataset.from_list(ragged_rows(8))
    tokenizer = ByT5Tokenizer(extra_ids=0)
    return CrowTrainer(str(tmp_path / "base"), args, rows, processing_class=tokenizer, peft_config=lora)


@pytest.mark.parametrize("is_adapter", [False, True], ids=["weights", "adapter"])
def test_plain_card_says_that_nothing_was_measured(is_adapter, tmp_path):
    """Fails if the plain card claims a removal, or if it, or the card that PEFT writes, names a local folder."""
    trainer = card_trainer(tmp_path, is_adapter)
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "Nothing was measured on it" in card.text and card.text.strip().startswith("# run")
    assert card.data.base_model is None and str(tmp_path) not in str(card)
    assert card.data.library_name == ("peft" if is_adapter else "transformers")
    assert set(card.data.tags) == {"crow", "backdoor-removal"} | ({"lora"} if is_adapter else set())


@pytest.mark.parametrize("is_adapter", [False, True], ids=["weights", "adapter"])
def test_create_model_card_keeps_an_existing_card(is_adapter, tmp_path):
    """Fails if the plain card or that of PEFT replaces the card of `purify()`, or if a passed card is not written."""
    trainer = card_trainer(tmp_path, is_adapter)
    readme = tmp_path / "run" / "README.md"
    trainer.create_model_card("first")
    trainer.save_model()
    trainer.create_model_card()
    assert readme.read_text(encoding="utf-8") == "first"
    trainer.create_model_card("second")
    assert readme.read_text(encoding="utf-8") == "second"


if __name__ == "__main__":
    # Log everything, because any log line could print the token.
    logging.basicConfig(level=logging.DEBUG)
    Client(sys.argv[1]).run()
