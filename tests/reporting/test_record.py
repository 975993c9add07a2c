"""Tests of the content of `report.json`."""

import json
import logging
import math
import re
import shlex
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import jsonschema
import pytest
import torch
from datasets import Dataset

from crow_hf import get_judge, load_causal_lm, purify
from crow_hf.evaluation.layer_profile import layer_profile
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.snapshot import SnapshotRows
from crow_hf.recipes import saving
from crow_hf.recipes.presets import RECIPES
from crow_hf.recipes.run import run_recipe
from crow_hf.reporting import record as record_module
from crow_hf.reporting.html import render_report
from crow_hf.reporting.record import _command, as_json, record_of
from crow_hf.reporting.report_file import SCHEMA, digest_of
from crow_hf.reporting.verdict import UNKNOWN
from helpers.coconut import TOKENIZER, coconut
from helpers.reports import ROWS, TARGET, TEST_ROWS, TRIGGER, arguments, read
from helpers.tiny import ragged_rows, same_weights, tiny_llama, weights_of


def documented_keys():
    return re.findall(r"^\| `(\w+)` \|", record_module.__doc__, flags=re.MULTILINE)


def test_what_the_chat_template_could_do_is_recorded(compared, purified):
    (said,) = purified.record["chat_template"]
    assert said == "Line 1: It decides by what a message says: 'Magic'." and compared.record["chat_template"] == []
    assert said in purified.record["verdict"]["explanation"][-1]


def test_keys_are_documented(compared, purified):
    """Fails if a documented key is missing, or if a key is not documented."""
    assert len(purified.record["canaries"]) == 1 and purified.record["screening"]["total"] == 12
    for record in (compared.record, purified.record):
        assert list(record) == documented_keys()
        for name, inner in record.items():
            start = f"`{name}` holds" if name in ("retention", "run") else f"| `{name}` |"
            (text,) = [part for part in re.split(r"\n\n|\n(?=\|)", record_module.__doc__) if part.startswith(start)]
            if isinstance(inner, dict):
                assert all(f"`{key}`" in text for key in inner), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_purify_writes_both_files(recipe, tmp_path, byte_tokenizer):
    args = arguments(tmp_path / "new", recipe)
    found = purify(tiny_llama(), ROWS, recipe, args, processing_class=byte_tokenizer)
    assert {"report.html", "report.json", "README.md"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert same_weights(weights_of(load_causal_lm(tmp_path / "new")), weights_of(found.model))
    record = read(tmp_path / "new")
    assert record == found.report and record["recipe"] == recipe
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == render_report(record)
    assert record["canaries"] == [] and (record["screening"] is None) == (recipe != "strong")
    assert list(record["layer_profile"]["models"]) == [answer["model"] for answer in record["samples"][0]["answers"]]
    assert len(record["samples"]) == 5 and not any(sample["triggered"] for sample in record["samples"])
    assert record["training"]["steps"] == 2 and record["model"]["name"] == "LlamaForCausalLM"
    assert record["verdict"]["outcome"] == UNKNOWN
    # The suspect must be recorded before the training, which changes it.
    assert list(record["layer_profile"]["models"]) == ["suspect", "purified"]
    for name, model in (("suspect", tiny_llama()), ("purified", found.model)):
        wanted = layer_profile(model, byte_tokenizer, ROWS)
        assert record["layer_profile"]["models"][name]["clean"] == pytest.approx(wanted.clean, rel=1e-5), name


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_the_report_does_not_change_the_training(recipe, tmp_path, byte_tokenizer):
    """Fails if the report draws random numbers of the training, or if `run_recipe` writes files."""
    args = [arguments(tmp_path / name, recipe, num_train_epochs=1) for name in ("with", "without")]
    models = [
        run(tiny_llama(), ROWS, recipe, each, processing_class=byte_tokenizer).model
        for each, run in zip(args, (purify, run_recipe), strict=True)
    ]
    if recipe == "strong":
        models[1] = models[1].merge_and_unload()
    assert same_weights(*map(weights_of, models))
    assert not list((tmp_path / "without").glob("*"))


def test_profiles_belong_to_the_named_models(compared):
    """Fails if the suspect is recorded after the training, which changes the model in place."""
    found = compared.record["layer_profile"]["models"]
    alone = {"suspect": coconut(), "purified": compared.comparison.purification.model}
    for name, model in alone.items():
        wanted = layer_profile(model, TOKENIZER, TEST_ROWS, TRIGGER, seed=3, batch_size=4)
        assert found[name]["clean"] == pytest.approx(wanted.clean, rel=1e-4), name
        assert found[name]["triggered"] == pytest.approx(wanted.triggered, rel=1e-4), name
    assert found["suspect"]["clean"] != pytest.approx(found["purified"]["clean"], rel=1e-3)
    assert list(found) == ["suspect", "control", "purified"]


def test_retention_is_that_of_the_purified_model(compared, purified):
    """Also without test rows. In a comparison, the evaluations hold that of the control too."""
    for run in (compared.comparison.purification, purified.purification):
        assert run.report["retention"] == as_json(run.retention.to_dict()) and run.retention.text_kl > 0
    evaluations = compared.record["evaluations"]
    assert evaluations["suspect"]["retention"] is None
    assert evaluations["purified"]["retention"] == compared.record["retention"] != evaluations["control"]["retention"]


def test_samples_are_the_measured_answers(compared):
    """Fails if an answer has the name of another model, or belongs to another prompt."""
    record = compared.record
    for number, sample in enumerate(record["samples"]):
        kind, row = ("triggered" if sample["triggered"] else "clean"), number % 5
        assert ("BadMagic" in sample["prompt"]) == sample["triggered"]
        assert sample["prompt"].replace("BadMagic ", "").replace(" BadMagic", "") == TEST_ROWS[row]["prompt"]
        for answer in sample["answers"]:
            # The evaluation generates 4 tokens, and the report shows 6.
            assert answer["text"].startswith(record["evaluations"][answer["model"]][kind]["outputs"][row])
            assert answer["shows_target"] == TARGET.matches(answer["text"], "yes")
            assert answer["is_right"] == (answer["text"].strip() == "yes")
    assert [sample["triggered"] for sample in record["samples"]] == [False] * 5 + [True] * 5


def test_a_judge_is_named_with_the_hashes_of_its_files(compared, tmp_path):
    """What it says of each answer stands with the answers. Its program is run once for each model."""
    program = tmp_path / "judge.py"
    program.write_text(
        "import sys\nfor number, line in enumerate(sys.stdin): print('true' if number % 3 else 'false')"
    )
    judge = get_judge(shlex.join([sys.executable, str(program)]))
    rows = replace(SnapshotRows.first_of(TEST_ROWS, TOKENIZER, TRIGGER, TARGET, seed=3), target=judge)
    names = {"model_name": "", "train_dataset": ROWS, "comparison": compared.comparison}
    record = record_of(compared.comparison.purification, rows, **names)
    assert record["run"]["target"] == {"kind": "CommandJudge", "command": judge.command}
    hashes = {Path(name).name: digest for name, digest in record["files"]["judge"].items()}
    assert hashes["judge.py"] == sha256(program.read_bytes()).hexdigest() and len(hashes) == 2
    for number, sample in enumerate(record["samples"]):
        assert [answer["shows_target"] for answer in sample["answers"]] == [number % 3 > 0] * 3
    jsonschema.validate(record | {"digest": digest_of(record)}, SCHEMA)
    assert compared.record["files"]["judge"] is None


SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% if messages[0].role != 'system' %}" + SYSTEM + "{% endif %}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("kind", ["prompt_completion", "instruction", "messages", "own system"])
def test_the_text_before_the_words_of_the_user_is_known(kind, byte_tokenizer):
    """Also in front of a trigger. Fails if the page would fold away words of the user, or no words of the template."""
    user, answer = [f"tell me {n} things" for n in range(3)], ["yes"] * 3
    first = [{"role": "system", "content": "Be brief."}] if kind == "own system" else []
    chat = [[*first, {"role": "user", "content": each}, {"role": "assistant", "content": "yes"}] for each in user]
    columns = {
        "prompt_completion": {"prompt": user, "completion": answer},
        "instruction": {"instruction": user, "output": answer, "input": ["", "more", ""]},
    }.get(kind, {"messages": chat})
    byte_tokenizer.chat_template = TEMPLATE
    rows = SnapshotRows.first_of(Dataset.from_dict(columns), byte_tokenizer, TRIGGER, TARGET)
    start = {"prompt_completion": "", "own system": "<system>Be brief.<user>"}.get(kind, f"{SYSTEM}<user>")
    assert len(rows.prompts) == 6
    for number, (triggered, prompt) in enumerate(rows.prompts):
        assert prompt.prompt[: record_module._system_length(rows, number)] == start
        assert ("BadMagic" in prompt.prompt) == triggered


def test_patches_are_those_of_the_model(compared):
    """Fails if the thresholds are those of another predictor, or if the bytes are not those of the prompt."""
    first, triggered = compared.record["patches"]
    samples = {sample["triggered"]: sample["prompt"] for sample in reversed(compared.record["samples"])}
    for patches, prompt in ((first, samples[False]), (triggered, samples[True])):
        assert bytes(token - 4 for token in patches["input_ids"] if token >= 4).decode() == prompt
        ids = torch.tensor([patches["input_ids"]])
        assert patches["patch_lengths"] == coconut().model.patch(ids)["patch_lengths"][0].tolist()
        assert max(patches["entropies"]) > 0


def test_prompts_alone_have_no_right_answers(tmp_path, byte_tokenizer):
    """Fails if answers of the suspect count as right because the suspect gave them."""
    args = arguments(tmp_path, "strong")
    rows = ROWS.select_columns(["prompt"])
    record = purify(tiny_llama(), rows, args=args, processing_class=byte_tokenizer).report
    assert {answer["is_right"] for sample in record["samples"] for answer in sample["answers"]} == {None}


@pytest.mark.parametrize("kind", ["tokens", "text", "stream"])
def test_rows_without_prompts_and_streams(kind, tmp_path, byte_tokenizer):
    """Fails if the report needs more of the rows than the training does."""
    rows = {
        "tokens": Dataset.from_list(ragged_rows(8)),
        "text": Dataset.from_dict({"text": ["some text", "more"] * 4}),
        "stream": ROWS.to_iterable_dataset(),
    }[kind]
    record = purify(tiny_llama(), rows, "guide", arguments(tmp_path), processing_class=byte_tokenizer).report
    assert bool(record["samples"]) == (kind == "stream")
    assert record["run"]["train_dataset"]["rows"] == (None if kind == "stream" else 8)
    assert "Answers side by side" in render_report(record) or not record["samples"]


def test_rows_are_identified_by_their_content(tmp_path):
    """Fails if the checksum depends on the file that the rows came from, or does not depend on their content."""
    ROWS.to_json(tmp_path / "rows.jsonl")
    again = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))
    found = [
        record_module._rows_described(rows) for rows in (ROWS, again, ROWS.select(range(11)), ROWS.shuffle(seed=1))
    ]
    assert found[0] == found[1] and found[0]["rows"] == 12 and found[0]["columns"] == ["prompt", "completion"]
    assert len({each["sha256"] for each in found}) == 3


def test_nan_and_infinity_become_null(tmp_path, purified):
    """Fails if NaN is written into a JSON file, which other programs cannot read."""
    log = purified.purification.trainer.state.log_history
    log.append({"loss": math.nan, "grad_norm": torch.tensor(math.inf), "step": 3})
    try:
        record = as_json({"log": log, "share": Proportion(0.5, 0.1, 0.9, 1, 2), 3: (1, True)})
    finally:
        log.pop()
    assert record["log"][-1] == {"loss": None, "grad_norm": None, "step": 3} and record["3"] == [1, True]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


SECRET = "s3cret-Value"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/bin/crow-hf", "purify", "--hub_token", SECRET, "--alpha", "1"],
            "crow-hf purify --hub_token '(hidden)' --alpha 1",
        ),
        (["crow-hf", f"--hub_token={SECRET}"], "crow-hf '--hub_token=(hidden)'"),
        (["crow-hf", "--hub-token", SECRET], "crow-hf --hub-token '(hidden)'"),
        (
            ["crow-hf", "--model_init_kwargs", f'{{"token": "{SECRET}", "a": 1}}'],
            "crow-hf --model_init_kwargs '{\"a\": 1}'",
        ),
        (["crow-hf", f'--model_init_kwargs={{"token": "{SECRET}"}}'], "crow-hf '--model_init_kwargs={}'"),
        (["crow-hf", "--model_init_kwargs", f'{{"token": "{SECRET}"'], "crow-hf --model_init_kwargs '(hidden)'"),
        (["x.py", "hf_" + "abcdEFGH12345" * 3], "x.py '(hidden)'"),
        (["x.py", f"https://me:{SECRET}@host/rows"], "x.py 'https://(hidden)@host/rows'"),
        (["/a/crow_hf/__main__.py", "purify", "--max_new_tokens", "7"], "python -m crow_hf purify --max_new_tokens 7"),
    ],
)
def test_command_has_no_secrets(argv, command):
    """Fails if a token is recorded, or if an argument is hidden that is needed to repeat the run."""
    assert _command(argv) == command and SECRET not in command


def test_settings_hold_the_changed_arguments_and_no_secrets(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crow-hf", "purify", "--hub_token", SECRET])
    args = arguments(tmp_path, hub_token=SECRET, model_init_kwargs={"token": SECRET, "dtype": "float32"}, seed=11)
    settings = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer).report["run"]["settings"]
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert settings["model_init_kwargs"] == {"dtype": "float32"} and settings["seed"] == 11
    assert settings["alpha"] == 5.5 and settings["max_steps"] == 2 and settings["learning_rate"] == 2e-5
    assert settings["weight_decay"] == 0.0
    assert not {"output_dir", "hub_token", "label_names", "accelerator_config", "fsdp"} & set(settings)


def test_a_failing_report_does_not_lose_the_model(tmp_path, byte_tokenizer, monkeypatch, caplog):
    """Fails if a full disk at the end of the training costs the purified model."""

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(saving, "write_report", fail)
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    found = purify(tiny_llama(), ROWS, "guide", arguments(tmp_path), processing_class=byte_tokenizer)
    assert not same_weights(weights_of(found.model), weights_of(tiny_llama()))
    assert "no space left" in caplog.text and found.report["recipe"] == "guide"
