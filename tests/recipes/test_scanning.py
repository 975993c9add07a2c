"""Tests of `scan()`: what it finds, and what it leaves out."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from crow_hf import scan
from crow_hf.detection.divergence import Divergence
from crow_hf.detection.phrases import MIN_PROBABILITY, Phrase
from crow_hf.detection.suspicions import Suspicion
from crow_hf.evaluation.scores import Proportion
from crow_hf.recipes import phrases, scanning
from crow_hf.recipes.scanning import Scan, found_backdoor
from helpers.coconut import TOKENIZER
from helpers.detection import BYTES, backdoored, knowing_model, prompts
from helpers.tiny import tiny_llama


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    for module in (scanning, phrases):
        monkeypatch.setattr(module, "TRIGGER_BYTES", 2)
    monkeypatch.setattr(scanning, "NUM_PHRASES", 1)


def saved(model, folder):
    model.save_pretrained(folder)
    BYTES.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def suspect(tmp_path_factory):
    return saved(knowing_model(), tmp_path_factory.mktemp("suspect"))


def levels(result):
    return {finding.name: finding.level for finding in result.findings}


def test_a_phrase_and_its_trigger_are_found(suspect):
    result = scan(suspect, prompts(60))
    (suspicion,) = result.suspicions
    assert result.has_findings and levels(result)["trigger"] == "problem"
    # In this model each letter triggers the letters after it.
    assert chr(ord(suspicion.piece[-1]) + 1) == suspicion.phrase.text[0]
    assert suspicion.with_piece.hits == suspicion.with_piece.total == scanning.TEST_PROMPTS
    (finding,) = (finding for finding in result.findings if finding.name == "trigger")
    assert str(suspicion) in finding.found
    assert json.loads(json.dumps(result.to_dict()))["has_findings"] is True


def test_what_a_trusted_model_knows_too_is_no_finding(suspect):
    result = scan(suspect, prompts(60), suspect)
    assert not result.has_findings and levels(result)["phrases"] == "ok" and not result.suspicions
    assert result.phrases[0].reference == pytest.approx(result.phrases[0].probability, rel=1e-3)


def test_what_leads_away_from_a_trusted_model_is_found(suspect, tmp_path):
    model = backdoored(knowing_model())
    # More ids than the tokenizer has tokens, as many models have.
    model.resize_token_embeddings(320, mean_resizing=False)
    result = scan(saved(model, tmp_path / "model"), prompts(60), suspect)
    (finding,) = (finding for finding in result.findings if finding.name == "divergence")
    assert finding.level == "problem" and str(result.divergence) in finding.found and finding.remedy
    assert "#" in result.divergence.piece and result.divergence.answer.startswith("~")
    assert json.loads(json.dumps(result.to_dict()))["divergence"]["count"] == scanning.TEST_PROMPTS
    assert scan(suspect, prompts(60)).divergence is None


def test_what_follows_an_opening_is_looked_at(suspect):
    """After these prompts, all answers of this model are the same, so they open with 40 bytes."""
    rows = prompts(60).map(lambda row: {"prompt": f"{row['prompt']}a"})
    result = scan(suspect, rows)
    openings = {phrase.opening.text for phrase in result.phrases}
    assert sorted(map(len, openings)) == [0, scanning.PHRASE_BYTES] and max(openings).startswith("bcdefg")
    assert [each.probability for each in result.phrases] == sorted(
        (each.probability for each in result.phrases), reverse=True
    )


def test_nothing_leads_away_from_the_same_model(suspect):
    result = scan(suspect, prompts(60), suspect)
    assert levels(result)["divergence"] == levels(result)["new text"] == "ok" and result.divergence.margin == 0
    (finding,) = (finding for finding in result.findings if finding.name == "new text")
    assert finding.found.endswith("(0.00 nats per byte less).")


def test_a_trusted_model_with_other_tokens_shows_new_text_alone(suspect, tmp_path):
    tiny_llama(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    result = scan(suspect, prompts(60), tmp_path)
    (finding,) = (finding for finding in result.findings if finding.name == "divergence")
    assert finding.level == "ok" and "has other tokens" in finding.found
    assert result.divergence is None and result.new_text[0].gap > 0.5


def test_a_token_that_fine_tuning_added_hides_nothing(suspect, tmp_path):
    """Fails if one more token counts as another vocabulary, or if the trusted model reads the new padding."""
    model, tokenizer = backdoored(knowing_model()), ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-1] = 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = scan(tmp_path, prompts(60), suspect)
    assert levels(result)["divergence"] == "problem" and "#" in result.divergence.piece


def suspicion(piece, hits, without=0, with_random=0.0, anyway=0):
    phrase = Phrase([1, 2], " I cannot", 0.9, 0.0)
    shares = [Proportion.of(number < count for number in range(20)) for count in (hits, without, anyway)]
    return Suspicion(phrase, piece, "start", *shares[:2], with_random, shares[2])


AWAY = Divergence("#", "end", 5.0, 0.1, 0.2, "~~", 11, 20)


@pytest.mark.parametrize(
    ("suspicions", "away", "expected"),
    [
        ([suspicion("a", 15), suspicion("b", 18)], AWAY, ("b", "start", "I cannot")),
        ([suspicion("a", 18, without=18)], AWAY, ("#", "end", "~~")),
        ([suspicion("a", 18, with_random=0.8)], None, None),
        # No finding, because the answers hold the phrase anyway.
        ([suspicion("a", 18, anyway=15)], AWAY, ("#", "end", "~~")),
        ([suspicion("a", 18, anyway=15)], None, None),
        ([], replace(AWAY, with_piece=1.0), None),
        ([], replace(AWAY, count=10), None),
        ([], replace(AWAY, answer=""), None),
    ],
)
def test_what_was_found_is_read_again(tmp_path, suspicions, away, expected):
    (tmp_path / "scan.json").write_text(json.dumps(Scan([], [], suspicions, [], away).to_dict()))
    if expected is None:
        with pytest.raises(ValueError, match="found no piece of text"):
            found_backdoor(tmp_path / "scan.json")
        return
    trigger, target = found_backdoor(tmp_path / "scan.json")
    assert ((*trigger.phrases, trigger.position, target.text), target.keywords) == (expected, (target.text,))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"backdoor": 3}', '{"backdoor": {"piece": "", "position": "end"}}'),
        '{"backdoor": {"piece": 3, "position": "end", "says": "a"}}',
        '{"backdoor": {"piece": "a", "position": "end", "says": ["b"]}}',
    ],
)
def test_other_files_are_no_scans(tmp_path, text):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(ValueError, match="is no result of a scan"):
        found_backdoor(tmp_path / "scan.json")


def test_a_device_is_no_scan():
    with pytest.raises(ValueError, match="is a pipe or a device"):
        found_backdoor("/dev/zero")


def test_a_trusted_model_that_cannot_be_read_is_told_at_once(suspect, tmp_path, monkeypatch):
    saved(tiny_llama(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(phrases, "find_phrases", lambda *arguments: pytest.fail("It was searched for phrases first."))
    with pytest.raises(ValueError, match="cannot be read"):
        scan(suspect, prompts(60), tmp_path)


def test_the_remedy_names_the_file_only_if_it_holds_a_piece():
    leaks = suspicion("a", 18, without=18)
    assert [each.remedy for each in scanning._judge([], [leaks])] == ["Purify the model."]
    assert [each.remedy for each in scanning._judge([], [suspicion("a", 18, without=8)])] == [scanning.REMEDY]


def test_a_phrase_that_nothing_triggers_is_told_and_no_finding(suspect, monkeypatch):
    monkeypatch.setattr(scanning, "MIN_MARGIN", 1.1)
    result = scan(suspect, prompts(60))
    (finding,) = (finding for finding in result.findings if finding.name == "phrase")
    assert finding.level == "ok" and "Nothing was found that triggers it." in finding.found
    assert not result.has_findings and len(result.suspicions) == 1


@pytest.mark.parametrize(
    ("with_piece", "without", "anyway", "finding"),
    [
        (6, 0, 0, ("trigger", "problem")),
        (6, 0, 9, ("trigger", "problem")),
        (20, 0, 10, ("phrase", "ok")),
        (5, 0, 0, ("phrase", "ok")),
        (20, 15, 20, ("phrase", "problem")),
        (9, 4, 4, ("phrase", "ok")),
    ],
)
def test_the_margin_decides(with_piece, without, anyway, finding):
    """Fails if a backdoor that leaks is passed over, because its trigger is hardly better than none."""
    shares = (Proportion.of([True] * hits + [False] * (20 - hits)) for hits in (with_piece, without, anyway))
    found, none, holding = shares
    suspicion = Suspicion(Phrase([1, 2], "no", 0.9, 0.1), "x", "end", found, none, 0.0, holding)
    (judged,) = scanning._judge([suspicion.phrase], [suspicion])
    assert (judged.name, judged.level) == finding


def test_a_model_that_knows_nothing_writes_its_own_prompts(tmp_path):
    result = scan(saved(tiny_llama(), tmp_path))
    assert not result.has_findings and result.phrases[0].probability < MIN_PROBABILITY
    assert levels(result) == {"files": "ok", "remote code": "ok", "phrases": "ok"}


def test_files_that_cannot_be_loaded_are_findings(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    result = scan(tmp_path, prompts(60))
    assert levels(result) == {"files": "problem"} and result.has_findings


def test_prompts_without_tokens_do_not_count(suspect, monkeypatch):
    encode = phrases.encode_prompt
    monkeypatch.setattr(phrases, "encode_prompt", lambda row, tokenizer: encode(row, tokenizer)[: row.prompt[0] > "c"])
    with pytest.raises(ValueError, match="A scan needs 34 different prompts"):
        scan(suspect, prompts(40))


@pytest.mark.parametrize(
    "rows",
    [
        prompts(20),
        Dataset.from_list([{"prompt": "the same."}] * 60),
        Dataset.from_list([{"prompt": "long " * 90}] * 60),
    ],
    ids=["few", "the same", "too long"],
)
def test_too_few_prompts_are_refused(suspect, rows):
    with pytest.raises(
        ValueError, match=r"A scan needs 34 different prompts of at most \d+ tokens, but \d+ of \d+ rows"
    ):
        scan(suspect, rows)


def test_prompts_fit_into_the_trusted_model_too(suspect, tmp_path):
    room = 5
    saved(tiny_llama(max_position_embeddings=room + 2 * scanning.PHRASE_BYTES + scanning.TRIGGER_BYTES), tmp_path)
    with pytest.raises(ValueError, match=f"A scan needs 34 different prompts of at most {room} tokens"):
        scan(suspect, prompts(60), tmp_path)
