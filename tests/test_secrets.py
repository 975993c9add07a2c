"""Secrets are hidden in what is shown, and found in what would be pushed."""

import json

import pytest

from crow_hf.secrets import HIDDEN, hide_secrets, holds_secret, remember_secrets, without_secrets


SECRET = "s3cret-Value"
# None of them is real. In two parts, so that no scanner takes this file for a leak.
TOKENS = [
    "hf_" + "abcdEFGHijkl0123456789ABCDefghIJKL",
    "gh" + "p_0123456789abcdefghijABCDEFGHIJ456789",
    "github" + "_pat_11ABCDEFG0123456789_abcdefghijklmnop",
    "sk-" + "proj-0123456789abcdefghijABCDEF",
    "sk-" + "0123456789abcdefghijABCDEF",
    "sk-" + "ant-api03-abcdefghij_klmnop-qrst",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "-----BEGIN " + "RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"hub_token": SECRET, "api-key": SECRET, "a": {"password": SECRET, "b": 1}}, {"a": {"b": 1}}),
        (f'{{"token": "{SECRET}", "a": 1}}', '{"a": 1}'),
        (f'{{"token": "{SECRET}"', HIDDEN),
        (f"https://me:{SECRET}@host/rows", f"https://{HIDDEN}@host/rows"),
        ("hf_" + "abcdEFGHijkl0123456789ABCDefghIJKL", HIDDEN),
        ("{cf}", "{cf}"),
        (f"{{'token': '{SECRET}'}}", HIDDEN),
        (f"{{a: 1, api_key = {SECRET}}}", HIDDEN),
        ({"headers": {"Authorization": SECRET, "cookie": SECRET}, "auth": SECRET, "apiKey": SECRET}, {"headers": {}}),
        ({"max_new_tokens": 7, "tokenizer": "t", "keys": 1}, {"max_new_tokens": 7, "tokenizer": "t", "keys": 1}),
        (7, 7),
        (None, None),
    ],
)
def test_secrets_are_removed_from_a_setting(value, shown):
    """Fails if a secret is shown, or if a harmless setting is hidden."""
    assert without_secrets(value) == shown


@pytest.mark.parametrize("before", ["", " ", "\n\t", "\ufeff", "["])
def test_json_is_json_with_something_before_it(before):
    """Fails if a space before the brace shows what stands in the braces."""
    text = before + json.dumps({"token": SECRET})
    assert SECRET not in without_secrets(text) and SECRET not in without_secrets(text + "]")


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_known_by_their_form(token, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"It says {token}, and more.")
    assert token not in hide_secrets(f"It says {token}") and holds_secret(file)


def test_plain_words_are_no_tokens(tmp_path):
    """Fails if a harmless file cannot be pushed, or if its text is hidden."""
    words = "hf_hub_download, a task-specific-and-well-known-model, risk-free sk-learn, AKIA, eyJ, PRIVATE KEY, a@b.c"
    words += ", sk-learn-finetuned-model-v2, hf_transformersimplementation, hf_quantizerconfiguration"
    file = tmp_path / "README.md"
    file.write_text(words)
    assert hide_secrets(words) == words and not holds_secret(file)


def test_secrets_are_remembered_by_their_values(tmp_path):
    """Fails if a token without a form of its own is found only where its name stands beside it."""
    token, word = "plain words as a password", "short"
    file = tmp_path / "tokenizer_config.json"
    file.write_text(f"{token} {word}")
    assert token in hide_secrets(token) and not holds_secret(file)
    remember_secrets({"a": [{"HUB_TOKEN": f"{token}\n", "my_secret": word, "tokens": "no secret"}]})
    assert hide_secrets(f"{token} {word} no secret") == f"{HIDDEN} {word} no secret" and holds_secret(file)


def test_passwords_that_are_words_hide_nothing(tmp_path, monkeypatch):
    """Fails if `DB_PASSWORD=password` hides the word everywhere, or if a vocabulary cannot be pushed."""
    monkeypatch.setattr("crow_hf.secrets._known", set())
    words = "password postgres unbelievable 12345 password1234"
    remember_secrets({"DB_PASSWORD": "password", "POSTGRES_PASSWORD": "postgres", "A_TOKEN": "unbelievable"})
    assert hide_secrets(words) == words
    remember_secrets({"DB_PASSWORD": "password1234"})
    assert hide_secrets(words) == f"password postgres unbelievable 12345 {HIDDEN}"
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"):
        (tmp_path / name).write_text(words)
        assert not holds_secret(tmp_path / name)
        (tmp_path / name).write_text(f"{words} {TOKENS[0]}")
        assert holds_secret(tmp_path / name)


def test_a_secret_is_found_across_two_parts_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("crow_hf.secrets._CHUNK", 64)
    file = tmp_path / "tokenizer.json"
    for before in range(60, 68):
        file.write_text("." * before + " " + TOKENS[0])
        assert holds_secret(file)


def test_of_weights_only_the_header_is_read(tmp_path):
    """Fails if billions of weights are searched, in which any few bytes stand somewhere."""
    header = b'{"__metadata__":{"a":"%s"}}'
    for said, found in ((b"nothing", False), (TOKENS[0].encode(), True)):
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header % said).to_bytes(8, "little") + header % said + TOKENS[1].encode())
        assert holds_secret(file) is found


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "rng_state.pth"])
def test_states_of_the_run_are_not_read(name, tmp_path):
    """Fails if the training waits while gigabytes of numbers are searched."""
    for file in (tmp_path / name, tmp_path / "tokenizer.bin"):
        file.write_text(TOKENS[0])
    assert not holds_secret(tmp_path / name) and holds_secret(tmp_path / "tokenizer.bin")


def test_the_working_directory_is_no_secret():
    """Fails if a variable of every shell is taken for one, so that no path is shown."""
    remember_secrets({"PWD": "/home/of/somebody", "HOME": "/home/of/somebody"})
    assert hide_secrets("in /home/of/somebody") == "in /home/of/somebody"
