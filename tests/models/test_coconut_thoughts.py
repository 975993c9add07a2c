"""Continuous thoughts: what feeds what, in every mode, in ragged batches; and the curriculum that teaches them."""

import pytest
import torch
from transformers import LlamaConfig, TrainingArguments

from crow_hf import ThoughtStage, reachability_rows, train_by_stages
from helpers.coconut import BACKBONES, DEEP, TEXTS, TOKENIZER, assert_same, batch_of, coconut, ids_of


def with_mode(model, mode, iterations=1):
    model.config.thought_mode, model.config.thought_iterations = mode, iterations
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_a_thought_is_the_latent_output_before_it(name):
    """What the backbone is given: at each thought what it said just before, everywhere else the patches as they are."""
    model, ids, given, embedded = with_mode(coconut(name), "recompute"), ids_of(TEXTS[1]), [], []
    backbone = model.latent_transformer.backbone
    handles = [
        backbone.register_forward_pre_hook(
            lambda m, a, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
        model.local_encoder.patch_projection.register_forward_hook(lambda m, a, output: embedded.append(output)),
    ]
    outputs = model(ids)
    [handle.remove() for handle in handles]
    thoughts = outputs.thought_mask
    assert thoughts.sum() == 3 and len(given) == 4
    said = backbone(inputs_embeds=given[-1], use_cache=False).last_hidden_state
    assert_same(given[-1][thoughts], said.roll(1, dims=1)[thoughts])
    assert_same(given[-1][~thoughts], embedded[0][None][~thoughts])
    assert_same(with_mode(model, "sequential")(ids).logits, outputs.logits)


@torch.no_grad()
def test_a_thought_that_follows_nothing_stays_what_it_is():
    model = coconut()
    ids = torch.tensor([[261, 101, 102]])
    for mode in ("sequential", "recompute"):
        outputs = with_mode(model, mode)(ids, output_hidden_states=True)
        state = outputs.encoder_hidden_states[-1][:, :1]
        own = model.local_encoder.pool(state, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1) > 0, 1)
        assert_same(outputs.hidden_states[0][:, :1], own)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_modes_agree_and_rows_are_alone(name):
    model, batch = coconut(name), batch_of(TEXTS)
    wanted = with_mode(model, "recompute")(**batch, output_hidden_states=True)
    found = with_mode(model, "sequential")(**batch, output_hidden_states=True)
    real = batch.attention_mask.bool()
    assert_same(found.logits[real], wanted.logits[real])
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert_same(one[found.patch_mask], other[found.patch_mask])
    assert_same(with_mode(model, "jacobi", 3)(**batch).logits[real], wanted.logits[real])
    assert not torch.allclose(with_mode(model, "jacobi", 1)(**batch).logits[real], wanted.logits[real], atol=1e-2)
    with_mode(model, "sequential")
    for row, text in enumerate(TEXTS):
        assert_same(found.logits[row, real[row]], model(ids_of(text)).logits[0])


def test_modes_agree_on_gradients():
    gradients = []
    for mode in ("sequential", "recompute", "jacobi"):
        model = with_mode(coconut(), mode, 3)
        batch = batch_of(TEXTS, "right")
        labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        model(**batch, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


def test_stages_by_hand():
    row = {"question": "Q", "steps": ["a", "b"], "answer": "c"}

    def read(**options):
        columns = ThoughtStage(TOKENIZER, **options)(row)
        assert [i for i, label in zip(columns["input_ids"], columns["labels"], strict=True) if label != -100] == [
            label for label in columns["labels"] if label != -100
        ]
        learned = sum(label != -100 for label in columns["labels"])
        ids = columns["input_ids"]
        return TOKENIZER.decode(ids[:-learned]), TOKENIZER.decode(ids[-learned:])

    assert read() == ("<bos>Q\n", "a\nb\n### c<eos>")
    assert read(stage=1) == ("<bos>Q\n<bot><latent><eot>", "b\n### c<eos>")
    assert read(stage=1, thoughts_per_step=2) == ("<bos>Q\n<bot><latent><latent><eot>", "b\n### c<eos>")
    assert read(stage=3) == ("<bos>Q\n<bot><latent><latent><latent><eot>", "### c<eos>")
    assert read(stage=1, drop_rest=True) == ("<bos>Q\n<bot><latent><eot>", "### c<eos>")
    assert read(drop_rest=True) == ("<bos>Q\n", "### c<eos>")
    with pytest.raises(ValueError, match="steps"):
        ThoughtStage(TOKENIZER)({"question": "Q", "steps": None, "answer": "c"})
    with pytest.raises(ValueError, match="stage"):
        ThoughtStage(TOKENIZER, stage=-1)


def test_questions_have_one_answer():
    """The right node can be reached and the other cannot; the steps lead there."""
    rows = reachability_rows(200, seed=0, num_nodes=9, steps=(2, 3))
    for row in rows:
        *edges, query = row["question"].rstrip("?").split(" ")
        root, _, choices = query.partition(":")
        reached, edges = {root}, [tuple(edge.split(">")) for edge in edges]
        for _ in edges:
            reached |= {b for a, b in edges if a in reached}
        assert [choice in reached for choice in sorted(choices.split("|"), key=row["answer"].__ne__)] == [True, False]
        path = [step.split(">") for step in row["steps"]]
        assert path[0][0] == root and path[-1][1] == row["answer"] and all(tuple(step) in edges for step in path)
        assert all(a[1] == b[0] for a, b in zip(path, path[1:], strict=False))
    assert len(set(rows["question"])) == 200
    assert reachability_rows(3, seed=5)["question"] == reachability_rows(3, seed=5)["question"]
    with pytest.raises(ValueError, match="num_nodes"):
        reachability_rows(1, seed=0, num_nodes=4, steps=(3,))


def test_the_curriculum_walks_its_stages_once(tmp_path, capfd):
    """Each stage is trained, kept, and not trained again."""
    model = coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1, "max_position_embeddings": 512}))
    rows = reachability_rows(8, seed=0, num_nodes=6, steps=(2,))
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True)
    before = model.lm_head.weight.detach().clone()
    train_by_stages(model, args, rows, TOKENIZER, num_stages=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"stage-{number}" for number in range(4)]
    assert not torch.equal(model.lm_head.weight, before)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    fresh = coconut(LlamaConfig(**DEEP | {"max_position_embeddings": 512}), seed=1)
    train_by_stages(fresh, args, rows, TOKENIZER, num_stages=2)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="10 thoughts"):
        train_by_stages(fresh, args, rows, TOKENIZER, num_stages=5, thoughts_per_step=2)
