"""Tests of the model card: it says only what was measured, and it says what was not."""

import math
import os
import re
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer

from crow_hf import CrowConfig, CrowTrainer, InvarianceConfig, load_causal_lm
from crow_hf.attacks.targets import Target
from crow_hf.attacks.triggers import Trigger
from crow_hf.cli.arguments import parse_arguments
from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.canaries import Canary
from crow_hf.evidence.last_look import LastLook
from crow_hf.evidence.result import Comparison, Purification
from crow_hf.reporting.model_card import _license, build_model_card
from helpers.evaluations import retention
from helpers.loopback_hub import TOKEN
from helpers.tiny import ragged_rows, tiny_llama


QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 4}


def card_of(tmp_path, model=None, kind=InvarianceConfig, facts=None, **kwargs):
    """Return the card of a trainer that never trained, and the text of the card."""
    args = kind(str(tmp_path / "run"), hub_token=TOKEN, **(QUIET | kwargs))
    rows = Dataset.from_list(ragged_rows(4))
    trainer = CrowTrainer(model or tiny_llama(), args, rows, processing_class=ByT5Tokenizer(extra_ids=0))
    card = build_model_card(trainer, **(facts or {}))
    return card, card.text


def evaluation(triggered=True):
    share = Proportion.of([True, False, False, False])
    scores = PromptScores(share if triggered else None, share, share, None, math.nan, ["secret answer"] * 4)
    return Evaluation(scores, scores if triggered else None)


def test_without_evidence_the_card_says_so(tmp_path):
    card, text = card_of(tmp_path)
    assert "Nothing: this model was not evaluated, and no canary was implanted." in text
    assert "No attack success with a known trigger was measured" in text
    assert "The model's answers were not measured" in text
    assert "model-index" not in card.data.to_dict() and "model_name" not in card.data.to_dict()


def test_with_canaries_alone_the_card_says_what_they_cannot_show(tmp_path):
    canary = Canary(Trigger(("Xyzzy",)), Target("t", ("t",)), Proportion.of([True] * 9), Proportion.of([False] * 9))
    facts = {"purification": Purification(None, "strong", None, None, [canary], retention=retention(1.25))}
    _, text = card_of(tmp_path, facts=facts)
    assert "Forgotten: running text takes 25.0 % more bits per byte than before" in text
    assert "Canary 'Xyzzy'" in text and "One that died proves little" in text
    assert "No attack success with a known trigger was measured" in text and "Nothing: " not in text


def test_utility_alone_does_not_count_as_removal(tmp_path):
    comparison = Comparison(*[evaluation(triggered=False)] * 3)
    card, text = card_of(tmp_path, facts={"comparison": comparison})
    assert "No attack success with a known trigger was measured" in text and "VERDICT" not in text
    assert {each.metric_type for each in card.data.eval_results} == {"empty", "degenerate"}
    assert "secret answer" not in str(card)


def test_the_metadata_are_about_the_purified_model(tmp_path):
    """Fails if the metadata hold the attack success of the suspect or of the control."""
    suspect = evaluation()
    suspect.triggered.target = Proportion.of([True] * 4)
    facts = {"comparison": Comparison(suspect, suspect, evaluation()), "test_dataset": "me/tests"}
    card, _ = card_of(tmp_path, facts=facts)
    (attack,) = [each for each in card.data.eval_results if each.metric_type == "attack_success_rate"]
    assert attack.metric_value == 0.25 and "4 prompts" in attack.metric_name
    assert (attack.dataset_type, attack.dataset_config) == ("me/tests", "triggered")


def test_one_name_of_rows_is_a_name(tmp_path):
    card, _ = card_of(tmp_path, facts={"datasets": "me/rows"})
    assert card.data.datasets == ["me/rows"]


def test_an_error_of_the_last_look_is_not_published(tmp_path):
    """Its text can name a folder of the user."""
    look = LastLook(trouble="/home/me/secret is full")
    _, text = card_of(tmp_path, facts={"purification": Purification(None, "strong", None, None, [], last_look=look)})
    assert "not loaded again (the report says why)" in text and "secret" not in text and look.trouble


def test_the_control_is_not_called_a_purification(tmp_path):
    assert "not a purification" in card_of(tmp_path, kind=CrowConfig, alpha=0.0)[1]
    assert "layers in agreement" in card_of(tmp_path, kind=CrowConfig)[1]


@pytest.mark.parametrize("kind", [InvarianceConfig, CrowConfig])
def test_settings_of_the_card_repeat_the_run(tmp_path, kind):
    """Fails if a setting is missing, or if the command line cannot read it."""
    changed = {"learning_rate": 3e-4, "seed": 7, "warmup_steps": 0.3, "weight_decay": 0.01, "max_length": 99}
    changed |= {"keep": 0.4} if kind is InvarianceConfig else {"alpha": 3.0}
    card, text = card_of(tmp_path, kind=kind, model_init_kwargs={"token": TOKEN}, **changed)
    assert TOKEN not in str(card)
    config = tmp_path / "settings.yaml"
    config.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    command = f"--config {config} --model m --dataset d --output_dir {tmp_path / 'again'}"
    _, args = parse_arguments("purify", command.split())
    assert type(args) is kind and args.max_steps == QUIET["max_steps"] and args.per_device_train_batch_size == 4
    assert {name: getattr(args, name) for name in changed} == changed


def test_card_of_a_model_without_a_name_takes_no_license_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("---\nlicense: mit\n---\n")
    assert card_of(tmp_path)[0].data.license is None


HOSTILE = "x`]\n---\nlicense: evil\n---\n# Title <script>[a](javascript:b)\u202e\x1b[2J"


def test_names_of_others_are_text(tmp_path):
    """Fails if the name of a folder, a trigger or a word of a template is markup, a heading or metadata."""
    facts = {"finetuned_from": HOSTILE, "model_name": HOSTILE, "backdoor": HOSTILE}
    facts |= {"comparison": Comparison(evaluation(), evaluation(), evaluation(), {HOSTILE: evaluation()})}
    facts["purification"] = Purification(None, "strong", None, chat_template=[HOSTILE])
    card, _ = card_of(tmp_path, facts=facts)
    text = str(card)
    assert ModelCard(text).data.license is None and card.data.license is None
    for raw in ("<script", "a](java", "\n# Title", "\u202e", "\x1b", "\n---\nlicense"):
        assert raw not in text, raw
    # The suspect, the template, the backdoor and the table.
    assert text.count(r"&lt;script>[a\](javascript:b)&lt;U+202E>␛[2J") == 4


@pytest.mark.parametrize(
    ("metadata", "taken"),
    [
        ("license: mit\ntags: [x]", {"license": "mit"}),
        (
            "license: 'other'\nlicense_name: my license 1.0\nlicense_link: LICENSE",
            ["other", "my license 1.0", "LICENSE"],
        ),
        ("license_link: https://example.org/license", {"license_link": "https://example.org/license"}),
        ("license_link: javascript:alert(1)", {}),
        ('license: "mit\\n---\\nlicense: evil"', {}),
        ("license: !!python/object/apply:os.system ['x']", {}),
        ("license: {a: b}", {}),
        ("license: &a [*a, *a]", {}),
    ],
)
def test_license_is_taken_over_if_it_is_plain(tmp_path, metadata, taken):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Model\nlicense: evil\n")
    names = ("license", "license_name", "license_link")
    assert _license(str(tmp_path)) == (taken if isinstance(taken, dict) else dict(zip(names, taken, strict=True)))


def test_card_of_a_suspect_that_is_no_file_is_not_read(tmp_path):
    """Fails if the run waits for a pipe, or reads a device without end, after all of its work."""
    os.mkfifo(tmp_path / "README.md")
    assert _license(str(tmp_path)) == {}


def test_adapter_on_a_local_base_names_the_way_to_load_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(load_causal_lm(tmp_path / "base"), LoraConfig(target_modules="all-linear"))
    card, text = card_of(tmp_path, model)
    assert card.data.base_model is None and "`PeftModel.from_pretrained`" in text and "The local model `base`" in text
    assert str(tmp_path) not in str(card)


def test_settings_of_the_card_hold_no_path(tmp_path):
    """Fails if the card names the file of the DeepSpeed configuration or a folder for `from_pretrained`."""
    rows = Dataset.from_list(ragged_rows(4))
    args = CrowConfig(str(tmp_path / "run"), model_init_kwargs={"cache_dir": str(tmp_path)}, **QUIET)
    trainer = CrowTrainer(tiny_llama(), args, rows, processing_class=ByT5Tokenizer(extra_ids=0))
    # DeepSpeed is not installed, so the path cannot be passed to the arguments.
    trainer.args.deepspeed = str(tmp_path / "zero2.json")
    assert str(tmp_path) not in str(build_model_card(trainer))
