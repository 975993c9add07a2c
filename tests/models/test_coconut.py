"""Tests of the byte-latent model: causality, patches, loss, loading, saving and refused arguments."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    T5Config,
    Trainer,
    TrainingArguments,
)

from crow_hf import ByteEntropyPredictor, CrowDataCollator, EntropyPatcher, PackedPatchDataCollator
from crow_hf.models.configuration_coconut import CoconutConfig
from crow_hf.models.modeling_coconut import CoconutForCausalLM, CoconutModel
from crow_hf.models.tokenization_coconut import CoconutTokenizer
from helpers.coconut import BACKBONES, DEEP, TEXTS, TOKENIZER, assert_same, batch_of, coconut, ids_of


VARIANTS = {
    "plain": {"binary_embeddings": False},
    "bits": {},
    "n-grams": {"hash_ngram_sizes": [2, 3], "hash_vocab_size": 50},
    "stride": {"patch_rule": "stride", "max_patch_length": 3},
    "minimum": {"patch_rule": "running_minimum", "max_patch_length": 5},
    "wide": {"cross_attention_k": 3, "cross_attention_heads": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_do_not_depend_on_later_bytes(variant):
    model = coconut(**VARIANTS[variant])
    ids = ids_of("Some bytes, in patches.\nAnd a line.")
    logits = model(ids).logits
    for position in (1, 7, 12, 25, ids.shape[1] - 1):
        for other in (ord("q") + 4, ord("\n") + 4, 2):
            changed = ids.clone()
            changed[0, position] = other
            assert_same(model(changed).logits[:, :position], logits[:, :position])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_do_not_depend_on_padding_and_other_rows(variant, side):
    model = coconut(**VARIANTS[variant])
    batch = batch_of(TEXTS, side)
    logits = model(**batch).logits
    # Neither the ids under the mask nor a mask for the pad token change the logits.
    hidden = torch.where(batch.attention_mask.bool(), batch.input_ids, 77)
    assert_same(model(hidden, batch.attention_mask).logits, logits)
    assert_same(model(batch.input_ids).logits, logits)
    for row, text in enumerate(TEXTS):
        assert_same(logits[row, batch.attention_mask[row].bool()], model(ids_of(text)).logits[0])


def test_a_row_of_padding_gives_no_nan():
    """Fails if NaN values of the padding row reach the loss or the gradients, since 0 * NaN is NaN."""
    for implementation in ("sdpa", "eager"):
        model = coconut().train()
        model.set_attn_implementation(implementation)
        batch = batch_of(TEXTS[:2])
        ids = torch.cat([batch.input_ids, torch.full_like(batch.input_ids[:1], TOKENIZER.pad_token_id)])
        labels = torch.where(ids == TOKENIZER.pad_token_id, -100, ids)
        outputs = model(ids, labels=labels)
        outputs.loss.backward()
        assert outputs.logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert_same(outputs.loss, model(batch.input_ids, labels=labels[:2]).loss)


@torch.no_grad()
def test_passed_patches_give_the_same_logits_as_found_ones():
    model, batch = coconut(), batch_of(TEXTS, "right")
    found = model(**batch)
    given = model(**batch, **model.model.patch(**batch))
    real = batch.attention_mask.bool()
    assert_same(given.logits[real], found.logits[real])
    assert found.entropies is not None and given.entropies is None
    assert torch.equal(given.patch_lengths, found.patch_lengths)
    assert torch.equal(found.patch_lengths.sum(1), batch.attention_mask.sum(1))
    assert torch.equal(found.patch_mask, found.patch_lengths > 0)


@torch.no_grad()
def test_model_and_transform_find_the_same_patches():
    """The model and `datasets.map` agree on where patches begin."""
    model = coconut()
    text = "The committee met in Reykjavik;\nnobody expected that it would vote twice.\n\n\tEnd 1.5é"
    document = EntropyPatcher(model.latent_transformer.entropy_predictor)({"text": [text]})
    ids, lengths = (torch.tensor(document[name][0])[None].long() for name in ("input_ids", "patch_lengths"))
    assert torch.equal(model.model.patch(ids)["patch_lengths"], lengths)
    # Lengths alone do not tell whether the last byte ends its patch, so it is left out.
    assert_same(model(ids, patch_lengths=lengths).logits[:, :-1], model(ids).logits[:, :-1])


@torch.no_grad()
def test_packed_parts_do_not_attend_to_each_other():
    """Parts of a document begin without a special token, so only positions separate them."""
    model = coconut(LlamaConfig(**DEEP | {"max_position_embeddings": 8}))
    columns = EntropyPatcher(model.latent_transformer.entropy_predictor)(
        {"text": ["A document that is cut in two or three."]}
    )
    row = {name: values[0].tolist() for name, values in columns.items()}
    packed = PackedPatchDataCollator(max_patches=8)([row])
    packed.pop("labels")
    # Two parts in one row, with positions that restart in the middle.
    joined = {name: torch.cat([value[0], value[1]])[None] for name, value in packed.items()}
    logits, length = model(**joined).logits[0], packed["input_ids"].shape[1]
    for part in range(2):
        # The last byte has no label. Its logits differ, because the next part shows whether its patch ended.
        real = ((packed["input_ids"][part] != TOKENIZER.pad_token_id).nonzero().flatten())[:-1]
        alone = model(**{name: value[part : part + 1] for name, value in packed.items()}).logits[0]
        assert_same(logits[part * length : (part + 1) * length][real], alone[real])


@pytest.mark.parametrize("variant", ["bits", "n-grams"])
@torch.no_grad()
def test_packed_documents_do_not_attend_to_each_other(variant):
    model = coconut(**VARIANTS[variant])
    texts = ["One document.", "Another one,\nlonger.", "Third"]
    columns = EntropyPatcher(model.latent_transformer.entropy_predictor)({"text": texts})
    rows = [{name: columns[name][i].tolist() for name in columns} for i in range(3)]
    packed = PackedPatchDataCollator(max_patches=14)(rows)
    labels = packed.pop("labels")
    assert len(packed["input_ids"]) < 3
    logits = model(**packed).logits
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        alone = model(ids, patch_lengths=torch.tensor(row["patch_lengths"])[None]).logits[0]
        windows = packed["input_ids"].unfold(1, ids.shape[1], 1)
        line, begin = (windows == ids[0]).all(-1).nonzero()[0].tolist()
        assert_same(logits[line, begin : begin + ids.shape[1]], alone)
    assert labels.shape == packed["input_ids"].shape


@torch.no_grad()
def test_embeddings_by_hand():
    ids = ids_of("ab")
    model = coconut(binary_embeddings=False)
    assert torch.equal(model.get_input_embeddings()(ids), model.model.byte_embedding.table(ids))
    model = coconut(hash_ngram_sizes=[2], hash_vocab_size=7)
    embedding = model.get_input_embeddings()
    bits = torch.tensor([[0.0] * 8, [-1, 1, 1, -1, -1, -1, -1, 1], [-1, 1, 1, -1, -1, -1, 1, -1]])
    rows = embedding._hashes(ids)[0, :, 0]
    by_hand = embedding.table(ids[0]) + embedding.bit_projection(bits) + embedding.ngram_table(rows)
    assert_same(embedding(ids)[0], by_hand)
    assert_same(model(ids, output_hidden_states=True).encoder_hidden_states[0][0], by_hand)
    # The bigram of a text's first token does not include the token before it.
    assert torch.equal(embedding._hashes(torch.tensor([[99, 1, 101, 102]]))[0, 1:, 0], rows)


def test_loss_is_the_mean_over_labels_or_over_items_in_batch():
    model, ids = coconut(), ids_of("Loss of bytes")
    labels = torch.where(torch.arange(ids.shape[1]) < 5, -100, ids)
    outputs = model(ids, labels=labels)
    by_hand = -outputs.logits.log_softmax(-1)[0, torch.arange(4, ids.shape[1] - 1), ids[0, 5:]]
    assert_same(outputs.loss, by_hand.mean())
    assert_same(model(ids, labels=labels, num_items_in_batch=20).loss, by_hand.sum() / 20)
    assert_same(model(ids, logits_to_keep=2).logits, outputs.logits[:, -2:])


def test_hidden_states_have_the_documented_shapes():
    model, batch = coconut(), batch_of(TEXTS)
    outputs = model(**batch, output_hidden_states=True)
    (rows, patches), width = outputs.patch_lengths.shape, model.config.encoder_config.hidden_size
    assert torch.stack(outputs.hidden_states).shape == (4, rows, patches, 32)
    assert torch.stack(outputs.encoder_hidden_states).shape == (2, *batch.input_ids.shape, width)
    assert torch.stack(outputs.decoder_hidden_states).shape == (4, *batch.input_ids.shape, width)
    assert outputs.thought_mask.sum(1).tolist() == [3, 3, 0, 1]


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_exactly_the_trainable_weights_get_gradients(loaded, tmp_path):
    """Distributed training waits forever for missing gradients. Loading must freeze the new weights."""
    model = coconut(hash_ngram_sizes=[3], hash_vocab_size=20)
    if loaded:
        model.save_pretrained(tmp_path)
        model = CoconutForCausalLM.from_pretrained(tmp_path)
        assert not any(p.requires_grad for p in model.latent_transformer.entropy_predictor.parameters())
    model.train()
    for text in (TEXTS[0], TEXTS[2]):
        model.zero_grad()
        ids = ids_of(text)
        model(ids, labels=ids).loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    predictor = model.latent_transformer.entropy_predictor
    assert not predictor.training and not any(p.requires_grad for p in predictor.parameters())


@pytest.mark.parametrize("text", [TEXTS[1], TEXTS[2]])
def test_gradient_checkpointing_changes_nothing(text):
    """Checkpointed layers drop the keys and values that sequential thoughts need."""
    ids, gradients = ids_of(text), []
    for checkpointing in (False, True):
        model = coconut().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert_same(*gradients)


def test_thresholds_change_the_patches_and_are_saved(tmp_path):
    model = coconut()
    ids = ids_of("These are thirty bytes or more.")
    before = model.model.patch(ids)["patch_lengths"].shape[1]
    model.binary_patch_module.threshold, model.binary_patch_module.relative_threshold = 0.8, 0.1
    after = model.model.patch(ids)["patch_lengths"].shape[1]
    assert after > before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.binary_patch_module.threshold, loaded.binary_patch_module.relative_threshold) == (0.8, 0.1)
    assert loaded.model.patch(ids)["patch_lengths"].shape[1] == after


def test_unusual_patch_sizes_are_warned_about_once(monkeypatch):
    messages = []
    monkeypatch.setattr("crow_hf.models.modeling_coconut.logger.warning", messages.append)
    ids = ids_of("These are many bytes. " * 12)
    model = coconut(LlamaConfig(**DEEP | {"max_position_embeddings": 512}))
    model(ids)
    assert messages == []
    model.model._checked_patch_size = False
    model.binary_patch_module.threshold = 0.0
    model(ids)
    model(ids)
    assert len(messages) == 1 and "1.0 bytes" in messages[0] and "calibrate_threshold" in messages[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boundaries_do_not_depend_on_the_precision(tmp_path, dtype):
    model = coconut()
    model.save_pretrained(tmp_path)
    ids = ids_of("The same boundaries in every precision, whatever the rest is computed in.")
    wanted = model.model.patch(ids)["patch_lengths"]
    half = CoconutForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert half.lm_head.weight.dtype == dtype and half.latent_transformer.entropy_predictor.dtype == torch.float32
    assert torch.equal(half.model.patch(ids)["patch_lengths"], wanted)
    if dtype == torch.bfloat16:
        assert half(ids).logits.dtype == dtype
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(ids).patch_lengths, wanted)


def test_device_maps_load_the_same_model(tmp_path):
    """Fails if a device map splits a module such as the predictor with its tied weights."""
    model = coconut()
    model.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert_same(loaded(ids_of(TEXTS[0])).logits, model(ids_of(TEXTS[0])).logits)


def test_tied_weights_are_saved_and_loaded(tmp_path):
    model = coconut(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same(loaded(ids_of("tied")).logits, model(ids_of("tied")).logits)


@pytest.mark.parametrize("name", BACKBONES)
def test_saved_and_loaded_with_the_auto_classes(name, tmp_path):
    model = coconut(name, hash_ngram_sizes=[3], hash_vocab_size=20)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CoconutConfig)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), CoconutTokenizer)
    assert isinstance(AutoModel.from_pretrained(tmp_path), CoconutModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded(ids_of(TEXTS[1])).logits, model(ids_of(TEXTS[1])).logits, 2e-5)


def test_remote_code_loads_without_the_package(tmp_path):
    """Fails if the files saved with the weights import the rest of the package."""
    model = coconut()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    script = (
        "import sys; sys.modules['crow_hf'] = None; import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = tokenizer('a<bot><latent><eot>b', return_tensors='pt').input_ids\n"
        "generated = model.generate(ids, max_new_tokens=3).tolist()\n"
        "import json; print(json.dumps([ids.tolist(), model(ids).logits.sum().item(), generated]))\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, process.stderr
    ids = ids_of("a<bot><latent><eot>b")
    found_ids, total, generated = json.loads(process.stdout)
    assert found_ids == ids.tolist() and generated == model.generate(ids, max_new_tokens=3).tolist()
    assert_same(torch.tensor(total), model(ids).logits.sum())


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_keeps_its_weights(name, tmp_path):
    config = BACKBONES[name].__class__.from_dict(BACKBONES[name].to_dict() | {"vocab_size": 40})
    source = AutoModelForCausalLM.from_config(config)
    before = {key: value.clone() for key, value in source.state_dict().items()}
    source.save_pretrained(tmp_path)
    for backbone in (source, source.base_model, str(tmp_path)):
        model = CoconutForCausalLM.from_backbone(backbone)
        decoder = dict(source.base_model.named_parameters())
        for key, value in model.latent_transformer.backbone.named_parameters():
            assert (value.shape[0] == 1 and not value.requires_grad) or torch.equal(value, decoder[key]), key
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert source.config.vocab_size == 40


def test_plain_trainer_reduces_the_loss(tmp_path):
    ids = ids_of("A row of bytes to learn by heart")[0].tolist()
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4)
    model = coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1}))
    args = TrainingArguments(str(tmp_path), max_steps=8, learning_rate=1e-2, use_cpu=True, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=rows, data_collator=CrowDataCollator(263))
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_lengths": [[3, 2]]}, "patch_lengths"),
        ({"patch_lengths": [[1, 0, 5]]}, "patch_lengths"),
        ({"patch_lengths": [[7, -1]]}, "patch_lengths"),
        ({"input_ids": [[1, 101, 260, 261, 262, 102]], "patch_lengths": [[2, 2, 1, 1]]}, "thought"),
        ({"position_ids": [[0, 1, 2, 3, 4, 5]]}, "patch_position_ids"),
        ({"input_ids": [[]]}, "empty"),
        ({"input_ids": [[1] + [5] * 130]}, "131 patches"),
        ({"input_ids": [[1] + [261] * 9]}, "9 thoughts"),
    ],
)
def test_bad_inputs_are_refused_on_one_line(changes, message):
    model = coconut(patch_rule="stride", max_patch_length=1)
    inputs = {"input_ids": [[1, 101, 102, 103, 104, 105]]} | changes
    with pytest.raises(ValueError, match=message) as error:
        model(**{name: torch.tensor(value, dtype=torch.long) for name, value in inputs.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_rule": "no such rule"}, "no such rule"),
        ({"patch_rule": "whitespace"}, "whitespace"),
        ({"patch_rule": "stride"}, "max_patch_length"),
        ({"thought_mode": "deep"}, "thought_mode"),
        ({"thought_iterations": 0}, "thought_iterations"),
        ({"max_thoughts": -1}, "max_thoughts"),
        ({"cross_attention_k": 0}, "cross_attention_k"),
        ({"cross_attention_heads": 3}, "divide"),
        ({"hash_ngram_sizes": [1]}, "hash_ngram_sizes"),
        ({"encoder_config": {"hidden_size": 64}}, "equally wide"),
        ({"encoder_config": {"sliding_window": 1}}, "`encoder_config.sliding_window` must be at least 2"),
        ({"decoder_config": {"sliding_window": 0}}, "`decoder_config.sliding_window` must be at least 2"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        coconut(**fields)


def test_embeddings_alone_are_refused():
    """PEFT passes `inputs_embeds` by name. The model must not ignore them."""
    model = coconut()
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="input_ids"):
        model(ids_of("a"), inputs_embeds=torch.zeros(1, 2, 32))


def test_bad_parts_are_refused(tmp_path):
    predictor = ByteEntropyPredictor(vocab_size=264, hidden_size=16, num_layers=1, num_heads=1, ff_dim=16)
    with pytest.raises(Exception, match="256 bytes"):
        coconut(entropy_predictor=predictor)
    with pytest.raises(Exception, match="decoder"):
        CoconutForCausalLM.from_backbone(T5Config(d_model=16, num_layers=1))
