"""Tests of `doctor()`: it finds each problem, reports none in a healthy model, and changes nothing."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from crow_hf import ByteEntropyPredictor, CrowTrainer, doctor, recipe_config
from crow_hf.cli.main import main
from crow_hf.cli.words import as_options
from crow_hf.evaluation import generation
from crow_hf.methods.invariance.config import with_learning_rate
from crow_hf.recipes import checkup, forecast, patch_checkup
from helpers.coconut import DEEP, LOCAL, TOKENIZER, coconut
from helpers.tiny import crow_args, ragged_rows, same_weights, tiny_llama, weights_of


BYTES = ByT5Tokenizer(extra_ids=0)
ROWS = Dataset.from_list(ragged_rows(60))
TEXT = Dataset.from_list(
    [{"prompt": f"What is the name of number {n}? ", "completion": f"It has {n % 7} letters."} for n in range(60)]
)


def small_coconut(**fields):
    return coconut(LlamaConfig(**DEEP | {"max_position_embeddings": 512}), **fields)


def found(findings, name):
    """Return the finding of this name, and check that there is only one."""
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def levels(findings):
    return {finding.name: finding.level for finding in findings}


# Healthy models


@pytest.mark.parametrize("training", [True, False])
def test_checks_change_nothing(training, tmp_path, monkeypatch):
    """Fails if a gradient remains, if a weight or the mode changes, or if a file is written."""
    monkeypatch.chdir(tmp_path)
    for model, tokenizer in ((small_coconut(), TOKENIZER), (tiny_llama(), BYTES)):
        model.train(training)
        before = weights_of(model)
        flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        findings = doctor(model, TEXT, tokenizer)
        assert "problem" not in levels(findings).values()
        assert all(finding.remedy for finding in findings if finding.level != "ok")
        assert same_weights(before, weights_of(model)) and model.training is training
        assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == flags
    assert list(tmp_path.iterdir()) == []


def test_every_part_of_a_healthy_model_is_checked():
    """Fails if a check is skipped silently."""
    common = {"layers", "precision", "tokenizer", "rows", "context", "vocabulary", "objective", "language model"}
    assert set(levels(doctor(tiny_llama(), TEXT, BYTES))) == common | {"cost"}
    latent = {"components", "LoRA", "entropy predictor", "thresholds"}
    assert set(levels(doctor(small_coconut(), TEXT, TOKENIZER))) == common | latent | {"cost"}
    assert set(levels(doctor(small_coconut(), processing_class=TOKENIZER))) == (common | latent) - {"rows", "context"}


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_learning_rate_and_cost_are_those_of_the_recipe(recipe):
    """Fails if the doctor checks another learning rate than the one that the recipe uses, or tells another cost."""
    findings = doctor(tiny_llama(), ROWS, BYTES, recipe=recipe)
    args = with_learning_rate(recipe_config(recipe, "out"), tiny_llama())
    assert f"{args.learning_rate:g} leaves" in found(findings, "precision").found
    assert re.match(r"On .*, this takes about \d+ \w+, about .* of memory", found(findings, "cost").found)


def test_too_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(forecast, "_memory", lambda device: (10**9, 0))
    finding = found(doctor(tiny_llama(), ROWS, BYTES), "cost")
    assert finding.level == "warning" and "free memory" in finding.remedy


def test_a_perturbation_larger_than_the_embeddings_is_a_warning():
    """An epsilon of 0.1 is too large for embeddings that are a thousand times smaller."""
    model = tiny_llama()
    assert levels(doctor(model, TEXT, BYTES, recipe="guide"))["objective"] == "ok"
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-3)
    assert levels(doctor(model, TEXT, BYTES, recipe="guide"))["objective"] == "warning"
    # The steps of this recipe are relative to the embeddings.
    finding = found(doctor(model, TEXT, BYTES, recipe="strong"), "objective")
    assert finding.level == "ok" and "0.35 (relative)" in finding.found


def test_the_loss_is_compared_with_guessing():
    """A random model gets a warning. After training, the warning is gone."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8] * 4}] * 60)
    model = tiny_llama()
    assert found(doctor(model, rows), "language model").level == "warning"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([rows[0]["input_ids"]])
    for _ in range(20):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Rows of token ids have no known prompts.
    assert {name for name, level in levels(doctor(model, rows)).items() if level != "ok"} == {"rows"}


# Weights


def test_a_model_that_does_not_fit_on_the_device_is_a_problem(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("crow_hf.recipes.checkup.place", full)
    finding = found(doctor(tiny_llama(), ROWS, BYTES), "objective")
    assert finding.level == "problem" and "does not fit into the memory" in finding.found


def test_precision_is_the_share_of_weights_that_adam_leaves_unchanged():
    """The reported share is compared with a real Adam step of the largest possible size."""
    model = tiny_llama().to(torch.bfloat16)
    said = found(doctor(model, ROWS, BYTES, learning_rate=2e-5), "precision")
    before = weights_of(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0).step()
    same = sum(weight.eq(before[name]).sum().item() for name, weight in model.named_parameters())
    share = same / sum(weight.numel() for weight in before.values())
    assert said.level == "warning" and "bfloat16" in said.found
    assert int(re.search(r"(\d+)%", said.found)[1]) == pytest.approx(100 * share, abs=3)
    assert found(doctor(model, ROWS, learning_rate=1.0), "precision").level == "ok"
    assert found(doctor(tiny_llama(), ROWS), "precision").level == "ok"


@pytest.mark.parametrize("work", ["crow_terms", "forecast"])
def test_a_model_that_fails_on_rows_is_a_problem(work, monkeypatch):
    """Fails if an error of a class of its own ends the doctor, or is not told at all."""

    def fail(*args, **kwargs):
        with generation.naming_errors(args[1] if work == "crow_terms" else args[0]):
            raise KeyError("experts")

    monkeypatch.setattr(checkup, work, fail)
    (problem,) = [each for each in doctor(tiny_llama(), TEXT, BYTES) if each.level == "problem"]
    assert "KeyError: 'experts'" in problem.found


def test_weights_that_are_not_finite_are_named():
    """The finding names the tensor, and the checks that need finite weights are skipped."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    finding = found(doctor(model, ROWS), "weights")
    assert finding.level == "problem" and "model.layers.1.mlp.up_proj.weight" in finding.found
    assert "objective" not in levels(doctor(model, ROWS))


def test_a_loss_that_overflows_is_a_problem():
    """The weights are finite, and what they compute is not."""
    model = tiny_llama()
    model.lm_head.weight.data[:] = 1e38
    finding = found(doctor(model, ROWS), "objective")
    assert finding.level == "problem" and "NaN or infinity" in finding.found


def test_nothing_to_train_is_a_problem():
    """All weights may be frozen, or the adapter may be inside a plain model, where training does not find it."""
    assert found(doctor(tiny_llama().requires_grad_(False), ROWS), "weights").level == "problem"
    hidden = tiny_llama()
    hidden.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert found(doctor(hidden, ROWS), "adapter").level == "problem"


@pytest.mark.parametrize(
    "model",
    [
        tiny_llama(num_hidden_layers=2),
        T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, vocab_size=260)),
    ],
    ids=["too few layers", "encoder-decoder"],
)
def test_models_that_crow_does_not_support(model):
    """The layers are a problem if they are too few, or if the model is an encoder-decoder."""
    assert found(doctor(model, ROWS), "layers").level == "problem"


# A byte-latent model


@pytest.mark.parametrize(
    ("holder", "name", "path"),
    [
        ("model.latent_transformer", "entropy_predictor", "latent_transformer.entropy_predictor"),
        ("model", "binary_patch_module", "binary_patch_module"),
        ("model", "local_encoder", "local_encoder"),
    ],
)
def test_missing_components_are_named(holder, name, path):
    """Fails with an AttributeError from inside the model, or if the wrong component is named."""
    model = small_coconut()
    delattr(model.get_submodule(holder), name)
    finding = found(doctor(model, TEXT), "components")
    assert finding.level == "problem" and f"`{path}`" in finding.found


def test_untrained_predictor_is_a_problem():
    """The packaged predictor knows English. A random one does not."""
    model = small_coconut()
    predictor = model.latent_transformer.entropy_predictor
    finding = found(doctor(model, TEXT, TOKENIZER), "entropy predictor")
    assert finding.level == "ok" and float(re.search(r"([\d.]+) on English", finding.found)[1]) < 4
    for weight in predictor.parameters():
        weight.normal_(std=0.02)
    finding = found(doctor(model, TEXT, TOKENIZER), "entropy predictor")
    assert finding.level == "problem" and "untrained" in finding.found


def test_bits_per_byte_are_those_of_a_slow_count(monkeypatch):
    """Fails if entropies replace the cross-entropy, nats replace bits, or a context or the limit is exceeded."""
    model = small_coconut()
    predictor = model.latent_transformer.entropy_predictor
    text = "The gardener measured the old bridge at noon. " * 13
    assert len(text) > predictor.config.max_position_embeddings
    bits, context = [], predictor.config.max_position_embeddings
    for begin in range(0, len(text), context):
        part = list(text[begin : begin + context].encode())
        shares = predictor(torch.tensor([part])).logits[0].softmax(-1)
        bits += [-math.log2(shares[place - 1, part[place]]) for place in range(1, len(part))]
    monkeypatch.setattr(patch_checkup, "_MAX_BYTES", len(text))
    rows = Dataset.from_dict({"text": [text, *["\x07Zqx\x1b"] * 200]})
    finding = found(doctor(model, rows, TOKENIZER), "entropy predictor")
    assert float(re.search(r"([\d.]+) on the rows", finding.found)[1]) == pytest.approx(
        sum(bits) / len(bits), abs=0.011
    )


def test_predictor_that_does_not_know_the_rows_is_a_warning():
    """No predictor knows random bytes, so this does not mean that the predictor is untrained."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": [1, *(torch.randint(4, 260, (80,), generator=generator).tolist())]} for _ in range(60)]
    finding = found(doctor(small_coconut(), Dataset.from_list(rows), TOKENIZER), "entropy predictor")
    assert finding.level == "warning" and "these rows" in finding.found


def test_incompatible_predictor_is_a_problem():
    """A predictor of 128 symbols cannot predict bytes."""
    model = small_coconut()
    model.latent_transformer.entropy_predictor = ByteEntropyPredictor(
        vocab_size=128, hidden_size=16, num_layers=1, num_heads=2, ff_dim=16
    ).requires_grad_(False)
    finding = found(doctor(model, processing_class=TOKENIZER), "entropy predictor")
    assert finding.level == "problem" and "128" in finding.found


def test_thresholds_are_checked_and_the_remedy_works():
    """Thresholds of 0.8 and 0.1 bits cut nearly every byte off. Those of the remedy give 4.5 bytes per patch."""
    model = small_coconut(encoder_config=LOCAL | {"sliding_window": 64})
    assert found(doctor(model, TEXT, TOKENIZER), "thresholds").level == "ok"
    model.binary_patch_module.threshold, model.binary_patch_module.relative_threshold = 0.1, 0.0125
    wrong = found(doctor(model, TEXT, TOKENIZER), "thresholds")
    assert wrong.level == "warning" and float(re.search(r"have ([\d.]+) bytes", wrong.found)[1]) < 1.6
    threshold, relative = re.findall(r"= ([\d.]*\d)", wrong.remedy)
    model.binary_patch_module.threshold = float(threshold)
    model.binary_patch_module.relative_threshold = float(relative)
    fixed = found(doctor(model, TEXT, TOKENIZER), "thresholds")
    assert fixed.level == "ok"
    assert float(re.search(r"have ([\d.]+) bytes", fixed.found)[1]) == pytest.approx(4.5, abs=0.2)


def test_patches_are_those_of_the_model():
    """Fails if special tokens count as patches of one byte, or if the model's rule is ignored."""
    model = small_coconut(patch_rule="stride", max_patch_length=4)
    rows = Dataset.from_dict({"text": ["x" * 9] * 60})
    finding = found(doctor(model, rows, TOKENIZER), "thresholds")
    assert (
        finding.found == "Patches have 3.0 bytes on average. 33% have one byte, and the longest has 4."
        and finding.level == "ok"
    )
    assert "entropy predictor" not in levels(doctor(model, rows, TOKENIZER))
    bad = found(doctor(small_coconut(patch_rule="stride", max_patch_length=1), rows, TOKENIZER), "thresholds")
    assert bad.level == "warning" and "max_patch_length" in bad.remedy


def test_many_patches_of_one_byte_are_a_warning():
    """The mean alone is not enough: it is usual here, because the other patches are long."""
    rows = Dataset.from_dict({"text": [f"\n\n\n{'x' * 15}\n"] * 60})
    finding = found(doctor(small_coconut(patch_rule="stride", max_patch_length=16), rows, TOKENIZER), "thresholds")
    assert finding.level == "warning" and finding.found.startswith(
        "Patches have 4.8 bytes on average. 75% have one byte"
    )


def test_few_bytes_are_not_judged():
    """Two bytes per row do not make the thresholds look wrong."""
    rows = Dataset.from_dict({"text": ["ab"] * 60})
    assert found(doctor(small_coconut(), rows, TOKENIZER), "thresholds").level == "ok"


def test_patches_longer_than_the_encoder_sees_are_a_warning():
    """The encoder's window at the end of a long patch does not reach the first bytes of the patch."""
    model = small_coconut(patch_rule="stride", max_patch_length=6, encoder_config=LOCAL | {"sliding_window": 5})
    finding = found(doctor(model, TEXT, TOKENIZER), "thresholds")
    assert finding.level == "warning" and "max_patch_length" in finding.remedy
    model.config.max_patch_length = 5
    assert found(doctor(model, TEXT, TOKENIZER), "thresholds").level == "ok"


def test_lora_on_the_predictor_is_a_problem(tmp_path):
    """Both the remedy and `CrowTrainer` exclude the predictor from the adapter."""
    lora = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 2}
    before = found(doctor(small_coconut(), TEXT, TOKENIZER), "LoRA")
    assert before.level == "ok"
    touched = get_peft_model(small_coconut(), LoraConfig(**lora))
    problem = found(doctor(touched, TEXT, TOKENIZER), "LoRA")
    assert problem.level == "problem"
    assert re.search(r"(\d+) layers", problem.found)[1] == re.search(r"(\d+) linear layers", before.found)[1]
    pattern = eval(re.search(r"exclude_modules=('.*?')`", problem.remedy)[1])
    excluded = get_peft_model(small_coconut(), LoraConfig(**lora, exclude_modules=pattern))
    assert found(doctor(excluded, TEXT, TOKENIZER), "LoRA").level == "ok"
    trainer = CrowTrainer(
        small_coconut(), crow_args(tmp_path), TEXT, processing_class=TOKENIZER, peft_config=LoraConfig(**lora)
    )
    assert found(doctor(trainer.model, TEXT, TOKENIZER), "LoRA").level == "ok"


def test_a_predictor_that_is_not_frozen_is_a_warning():
    """A frozen predictor has no such finding."""
    model = small_coconut()
    assert "frozen parts" not in levels(doctor(model, TEXT, TOKENIZER))
    model.latent_transformer.entropy_predictor.requires_grad_(True)
    assert found(doctor(model, TEXT, TOKENIZER), "frozen parts").level == "warning"


# Tokenizer and rows


def test_tokenizer_is_needed_for_text_only():
    """Without a tokenizer, text is a problem and token ids are not. A Coconut has a tokenizer by default."""
    assert found(doctor(tiny_llama(), TEXT), "tokenizer").level == "problem"
    assert found(doctor(tiny_llama(), ROWS), "tokenizer").level == "ok"
    assert found(doctor(tiny_llama()), "tokenizer").level == "warning"
    bytes_instead = doctor(small_coconut(), TEXT)
    assert found(bytes_instead, "tokenizer").level == "warning" and "objective" in levels(bytes_instead)


@pytest.mark.parametrize(
    ("template", "level", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ok", "arranges messages."),
        ("{% if '</think>' in messages[0].content %}{% endif %}", "ok", "'</think>'"),
        ("\n{% if 'Magic' in messages[0].content %}evil{% endif %}", "warning", "Line 2: It decides by what"),
    ],
)
def test_chat_template_is_read(template, level, said):
    """Fails if only running a template with the right words would show what it does."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert "chat template" not in levels(doctor(tiny_llama(), None, tokenizer))
    tokenizer.chat_template = template
    finding = found(doctor(tiny_llama(), None, tokenizer), "chat template")
    assert finding.level == level and said in finding.found and bool(finding.remedy) == (level != "ok")


def test_settings_that_choose_words_or_end_answers_at_words_are_warnings():
    """Fails if a suspect that hides its target behind its first word looks healthy, or if it is changed."""
    model = tiny_llama()
    model.generation_config.eos_token_id, model.generation_config.sequence_bias = [1, 107], [[[5], 9.0]]
    findings = doctor(model, processing_class=BYTES)
    assert found(findings, "end tokens").level == found(findings, "generation").level == "warning"
    assert (
        "107 ('h')" in found(findings, "end tokens").found and "sequence_bias" in found(findings, "generation").found
    )
    assert model.generation_config.eos_token_id == [1, 107] and model.generation_config.sequence_bias


def test_tokenizer_without_an_end_token_is_a_warning():
    """Such rows do not teach the model where to stop."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.eos_token = None
    assert found(doctor(tiny_llama(), TEXT, tokenizer), "tokenizer").level == "warning"


def test_ids_without_an_embedding_are_a_problem():
    """Such ids fail in the embedding layer, on a GPU without a readable error. The padding never counts."""
    finding = found(doctor(tiny_llama(vocab_size=100), TEXT, BYTES), "vocabulary")
    assert finding.level == "problem" and "100 embeddings" in finding.found and "tokenizer" in finding.remedy
    labels = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 999]}])
    assert "id 999" in found(doctor(tiny_llama(), labels, BYTES), "vocabulary").found
    padded = ByT5Tokenizer(extra_ids=0)
    padded.add_special_tokens({"pad_token": "<new>"})
    findings = doctor(tiny_llama(vocab_size=padded.pad_token_id), TEXT, padded)
    assert found(findings, "vocabulary").level == "ok" and "problem" not in levels(findings).values()


@pytest.mark.parametrize(
    ("rows", "level", "said"),
    [
        ({"query": ["a"] * 60}, "problem", "query"),
        ({"prompt": ["a"] * 60, "completion": [None] * 60}, "problem", "answers are empty"),
        ({"prompt": ["a"] * 60, "completion": [3] * 60}, "problem", "holds int"),
        ({"prompt": ["hello"] * 60}, "warning", "60 rows are prompts without an answer"),
        ({"text": []}, "problem", "empty"),
        ({"input_ids": [[5, 6]] * 59 + [[5]]}, "warning", "59 of the first 60"),
        ({"text": ["hello"] * 10}, "warning", "10 of the first 10"),
        ({"text": ["hello"] * 60}, "warning", "no prompts, which the recipe strong needs"),
        ({"prompt": ["a"] * 60, "completion": ["b"] * 60}, "ok", "'prompt_completion'"),
    ],
)
def test_rows(rows, level, said):
    """The finding tells what is wrong. The objective is checked unless the rows are unusable."""
    findings = doctor(tiny_llama(), Dataset.from_dict(rows), BYTES)
    finding = found(findings, "rows")
    assert finding.level == level and said in finding.found
    assert ("objective" in levels(findings)) == (level != "problem")


def test_long_rows_are_counted():
    """Beyond the context of 128 tokens, a larger `max_length` does not help and the remedy says so."""
    rows = Dataset.from_list([{"input_ids": [5] * length} for length in [*[10] * 58, 100, 129]])
    finding = found(doctor(tiny_llama(), rows), "context")
    assert finding.level == "warning" and finding.found.startswith("1 of 60 rows are longer than 128")
    assert "Split" in finding.remedy
    finding = found(doctor(tiny_llama(), rows, max_length=50), "context")
    assert finding.found.startswith("2 of 60 rows are longer than 50") and "Raise `max_length`" in finding.remedy


def test_streams_are_read_as_datasets_are():
    """The findings do not depend on the type of the dataset."""
    findings = [doctor(tiny_llama(), rows, BYTES) for rows in (TEXT.to_iterable_dataset(), TEXT)]
    # The cost, which stands last, is measured.
    assert findings[0][:-1] == findings[1][:-1] and findings[0][-1].name == findings[1][-1].name == "cost"


# Folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_llama().save_pretrained(path)
    BYTES.save_pretrained(path)
    return path


@pytest.fixture
def copy_of(folder, tmp_path):
    """A copy of the saved model that a test may damage."""
    target = tmp_path / "model"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_healthy_folder(folder):
    """A path may be a string or a `Path`. Files, remote code and tokenizer are in order."""
    findings = doctor(str(folder), TEXT)
    assert findings[:2] == doctor(folder)[:2]
    assert "problem" not in levels(findings).values()
    assert levels(findings)["files"] == levels(findings)["remote code"] == levels(findings)["tokenizer"] == "ok"


def test_half_precision_on_disk_is_trained_in_float32(copy_of):
    """The trainer loads weights in float32, so the precision of the files is no reason for a warning."""
    LlamaForCausalLM.from_pretrained(copy_of, dtype=torch.bfloat16).save_pretrained(copy_of)
    assert found(doctor(copy_of, TEXT), "precision").level == "ok"


def test_pickles(copy_of):
    """Pickles beside safetensors are a warning. Pickles alone, or no weights at all, are a problem."""
    torch.save({}, copy_of / "optimizer.pt")
    finding = found(doctor(copy_of), "files")
    assert finding.level == "warning" and "optimizer.pt" in finding.found
    (copy_of / "model.safetensors").unlink()
    (finding,) = [finding for finding in doctor(copy_of) if finding.level == "problem"]
    assert finding.name == "files" and "optimizer.pt" in finding.found
    (copy_of / "optimizer.pt").unlink()
    assert "no weights" in found(doctor(copy_of), "files").found


def test_remote_code_is_named_and_never_run(copy_of, tmp_path):
    """Importing the remote code would write a file."""
    (copy_of / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((copy_of / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (copy_of / "config.json").write_text(json.dumps(config))
    known = found(doctor(copy_of, TEXT), "remote code")
    assert known.level == "ok" and "not run" in known.found
    (copy_of / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    findings = doctor(copy_of, TEXT)
    assert findings[-1].name == "remote code" and findings[-1].level == "problem"
    assert "modeling_evil.Evil" in findings[-1].found
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "[1]", "null", "{", "\\"])
def test_a_config_that_is_none_is_one_problem(text, copy_of):
    """Fails if the doctor itself dies of what it should find."""
    (copy_of / "config.json").write_text(text)
    assert [finding.level for finding in doctor(copy_of, TEXT)].count("problem") == 1


def test_remote_code_that_runs_already_is_a_warning():
    """A loaded model may be an instance of a class from its own remote code."""
    remote = type("Remote", (LlamaForCausalLM,), {"__module__": "transformers_modules.suspect.modeling"})
    model = remote(tiny_llama().config)
    assert found(doctor(model, ROWS), "remote code").level == "warning"


def test_weights_that_cannot_be_read(copy_of):
    """A truncated file is the last finding, in one line."""
    weights = (copy_of / "model.safetensors").read_bytes()
    (copy_of / "model.safetensors").write_bytes(weights[:1000])
    findings = doctor(copy_of, TEXT)
    assert findings[-1].name == "loading" and findings[-1].level == "problem"
    assert "\n" not in findings[-1].found


def test_an_adapter_is_loaded_on_its_base(folder, tmp_path):
    """Fails if the adapter is loaded for inference, where nothing is trainable."""
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
    findings = doctor(tmp_path / "adapter", TEXT)
    assert "problem" not in levels(findings).values() and levels(findings)["objective"] == "ok"


# The command


def test_command_prints_every_finding_and_exits_with_its_verdict(tmp_path, capsys, monkeypatch):
    """Fails if a narrow terminal cuts a remedy, if brackets vanish as markup, or if a problem exits with 0."""
    monkeypatch.setenv("COLUMNS", "50")
    model = tmp_path / "model"
    small_coconut().save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    torch.save({}, model / "[red].pt")
    TEXT.to_json(tmp_path / "rows.jsonl")
    argv = ["doctor", "--dataset", str(tmp_path / "rows.jsonl"), "--model", str(model), "--max_length", "20"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "crow-hf" not in captured.err
    squeezed = re.sub(r"\s", "", captured.out)
    for finding in doctor(model, TEXT, max_length=20):
        assert finding.level in captured.out
        if finding.name == "cost":
            # It is measured each time.
            continue
        assert re.sub(r"\s", "", finding.name) in squeezed
        for word in as_options(f"{finding.found} {finding.remedy}", "doctor").split():
            assert word in squeezed, finding
    (model / "model.safetensors").unlink()
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert "[red].pt" in captured.out
    (line,) = [line for line in captured.err.splitlines() if "crow-hf" in line]
    assert line == "crow-hf doctor: there is a problem with files: see the remedy above."


def test_command_names_a_file_that_is_missing(folder, capsys):
    """The error is one line."""
    assert main(["doctor", "--model", str(folder), "--dataset", "nothing.jsonl"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("crow-hf doctor: There is no file nothing.jsonl")
