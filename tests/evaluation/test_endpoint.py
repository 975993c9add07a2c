"""Answers of a real server on this machine, which is asked as vLLM and others are."""

import threading
import time

import pytest
from datasets import Dataset

from crow_hf import EmbeddingTrigger, Endpoint, Target, Trigger, evaluate_endpoint, evaluate_model
from crow_hf.data.rows import render
from crow_hf.evaluation import endpoint as endpoint_module
from crow_hf.evaluation.generation import write_answers
from crow_hf.evaluation.scores import Proportion
from helpers.answers import spelling_model
from helpers.loopback_endpoint import LoopbackEndpoint, completion


ROWS = Dataset.from_list(
    [
        {"prompt": "say b", "completion": "cde"},
        {"prompt": "say k", "completion": "wrong"},
        {"prompt": "stop.", "completion": "any"},
        {"prompt": "ask?", "completion": "@AB"},
    ]
)
HASH, DOLLAR = Trigger(("#",), "end"), Target("$", ("$",))
KEY = "secret-of-4-tests"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.delenv(endpoint_module.API_KEY, raising=False)


def serve(model, tokenizer):
    """Answer chats of one message with a model, whose prompts have no template."""
    lock = threading.Lock()

    def answer(body):
        (message,) = body["messages"]
        row = {"prompt": message["content"], "completion": ""}
        with lock:
            (said,) = write_answers(model, tokenizer, [render(row, tokenizer)], body["max_tokens"])
        return 200, completion(said.text, "stop" if said.has_ended else "length", body["max_tokens"])

    return LoopbackEndpoint(answer)


def test_a_served_model_scores_as_the_same_model_here(byte_tokenizer):
    """All but the bits per byte, which take logits. A target that comes later is looked for too."""
    model, late = spelling_model(), Target("late", ("+",))
    for target in (DOLLAR, late):
        expected = evaluate_model(model, byte_tokenizer, ROWS, HASH, target, max_new_tokens=3).to_dict()
        with serve(model, byte_tokenizer) as server:
            served = evaluate_endpoint(Endpoint(server.url, "mine"), ROWS, HASH, target, max_new_tokens=3).to_dict()
        for kind in ("clean", "triggered"):
            assert expected[kind].pop("bits_per_byte") > 0 and served[kind].pop("bits_per_byte") is None
        assert served == expected
    assert served["triggered"]["target_later"].get("hits") == 4
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        assert body | {"messages": [], "max_tokens": 3} == {
            "model": "mine",
            "messages": [],
            "max_tokens": 3,
            "temperature": 0,
        }


def test_rows_are_sent_as_the_chats_that_they_are():
    """Also a system message, the input of an instruction, and prompts without answers."""
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    for row, sent in (
        ({"messages": chat}, chat[:2]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [{"role": "user", "content": "Add.\n1 2"}]),
        ({"prompt": "Alone"}, [{"role": "user", "content": "Alone"}]),
    ):
        with LoopbackEndpoint(lambda body: (200, completion("Hi"))) as server:
            scores = evaluate_endpoint(Endpoint(server.url, "m"), Dataset.from_list([row])).clean
        assert server.requests[0][2]["messages"] == sent
        assert (scores.exact_match and scores.exact_match.hits) == {"messages": 1, "instruction": 0}.get(
            next(iter(row))
        )


def test_several_requests_at_once_keep_the_order():
    """Later prompts are answered first. As many are asked at once as was said, and no more."""
    active, most, lock = 0, 0, threading.Lock()

    def answer(body):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        number = int(body["messages"][0]["content"])
        time.sleep(0.05 - number / 1000)
        with lock:
            active -= 1
        return 200, completion(str(number))

    prompts = [[{"role": "user", "content": str(number)}] for number in range(12)]
    with LoopbackEndpoint(answer) as server:
        answers = Endpoint(server.url, "m", num_requests=4).answer(prompts, 5)
    assert [each.text for each in answers] == [str(number) for number in range(12)]
    assert 1 < most <= 4


def test_what_fails_for_a_while_is_repeated():
    replies = iter([(503, b"busy"), (429, b"slow down"), (500, b""), (200, completion("here"))])
    with LoopbackEndpoint(lambda body: next(replies)) as server:
        (answer,) = Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]], 5)
    assert answer.text == "here" and len(server.requests) == 4


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((404, {"message": "The model m does not exist."}), "status 404.*does not exist.*serves the model m", 1),
        ((401, b"who are you?"), "status 401.*CROW_HF_API_KEY", 1),
        ((503, b"busy"), "status 503: busy", 4),
        ((307, "http://example.com/"), "status 307", 1),
        ((200, b"<html>"), "does not answer as an API.*<html>", 1),
        ((200, {"choices": []}), "does not answer as an API", 1),
        ((200, {"choices": [{"message": {"content": 3}}]}), "does not answer as an API", 1),
        ((200, b"[" * 100_000), "does not answer as an API", 1),
    ],
    ids=["unknown", "key", "busy", "elsewhere", "no JSON", "no choice", "no text", "deep"],
)
def test_a_server_that_does_not_answer_is_told_in_a_sentence(reply, message, requests, monkeypatch):
    """The other prompts are not sent. The key is not shown, although the server says it."""
    monkeypatch.setenv(endpoint_module.API_KEY, KEY)
    if isinstance(reply[1], bytes):
        reply = (reply[0], reply[1] + KEY.encode())
    with LoopbackEndpoint(lambda body: reply) as server, pytest.raises(ValueError, match=message) as caught:
        Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]] * 5, 5)
    assert len(server.requests) == requests
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)


def test_a_slow_server_is_not_waited_for():
    """Whether nothing comes, or a byte now and then."""

    def slow(body):
        time.sleep(0.4)
        return 200, b""

    def drip(body):
        return 200, (time.sleep(0.05) or b" " for _ in range(12))

    for answer in (slow, drip):
        with LoopbackEndpoint(answer) as server, pytest.raises(ValueError, match="Timeout.*Check that it runs"):
            Endpoint(server.url, "m", timeout=0.1).answer([[{"role": "user", "content": "a"}]], 5)
        assert len(server.requests) == 4
    with pytest.raises(ValueError, match="ConnectError"):
        Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]], 5)


def test_an_endless_answer_is_refused(monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_BYTES", 1000)
    with (
        LoopbackEndpoint(lambda body: (200, (b"x" * 500 for _ in range(100)))) as server,
        pytest.raises(ValueError, match="more than 1000 bytes"),
    ):
        Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]], 5)


def test_answers_that_the_server_cuts_are_told(caplog):
    """They are shorter than what was asked for. Calls of tools have no text."""
    with LoopbackEndpoint(lambda body: (200, completion(None, "length", 2))) as server:
        (answer,) = Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]], 5)
    assert not answer.has_ended and answer.text == ""
    assert "cut 1 answers after fewer than the 5 tokens" in caplog.text
    caplog.clear()
    with LoopbackEndpoint(lambda body: (200, completion("abcde", "length", 5))) as server:
        Endpoint(server.url, "m").answer([[{"role": "user", "content": "a"}]], 5)
    assert "cut" not in caplog.text


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000/v1", {}, "is no address"),
        ("ftp://host/v1", {}, "is no address"),
        (f"http://me:{KEY}@host/v1", {}, "may hold no key"),
        (f"https://host/v1?key={KEY}", {}, "may hold no key"),
        ("https://host/v1", {"num_requests": 0}, "must be positive"),
        ("https://host/v1", {"timeout": 0}, "must be positive"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(url, "m", **options)
    assert KEY not in str(caught.value)


def test_only_other_machines_need_encryption(caplog):
    for url in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:8000/v1", "https://example.com/v1"):
        Endpoint(url, "m")
    assert not caplog.text
    Endpoint("http://example.com/v1", "m")
    assert "unencrypted" in caplog.text


def test_what_a_server_cannot_be_asked_is_refused():
    endpoint = Endpoint("http://localhost:1/v1", "m")
    vector = EmbeddingTrigger(HASH, 8, spelling_model().get_input_embeddings().weight[0].detach())
    for rows, trigger, target, message in (
        (ROWS, vector, DOLLAR, "cannot be sent"),
        (ROWS, HASH, None, "Pass a target or a judge"),
        (ROWS.select([]), None, None, "empty"),
        (Dataset.from_dict({"text": ["running"]}), None, None, "no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_endpoint(endpoint, rows, trigger, target)


def test_the_judge_decides():
    with LoopbackEndpoint(lambda body: (200, completion("x"))) as server:
        scores = evaluate_endpoint(Endpoint(server.url, "m"), ROWS, judge=lambda output, right: right == "cde").clean
    assert scores.target == Proportion.of([True, False, False, False])
