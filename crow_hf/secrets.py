"""Secrets, such as access tokens: they are not shown, and files that hold one are not pushed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


HIDDEN = "(hidden)"
# Names of options and of keys whose values are secret.
SECRET = re.compile(
    r"(^|[_-])(token|pass(word|wd|phrase)?|secret|credentials?|auth(orization)?|bearer|cookie|pat|(api)?key)$",
    re.IGNORECASE,
)
# The forms of secrets that say by themselves what they are.
_FORMS = re.compile(
    rb"(?<![A-Za-z0-9_-])(hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    rb"|sk-(?:proj-|ant-|svcacct-|admin-|or-v1-)[\w-]{20,}|sk-(?=[A-Za-z0-9_]*\d)[A-Za-z0-9_]{20,}"
    rb"|(AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.)"
    rb"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# What stands before a colon or an equals sign.
_NAME = re.compile(r"""(?<![\w-])([\w-]+)["'\\]*\s*[:=]""")
# Other values, such as `postgres`, can be words of any file.
_NO_WORD = re.compile(r"(?=.*\d).{12,}|.{20,}", re.DOTALL)
# Lists of words, in which any value may stand by chance.
_VOCABULARY = re.compile(r"tokenizer\.json|vocab.*|merges\.txt|.*\.model")
# The states of a run, which has written these many GB itself.
_STATES = re.compile(r"(?!tokenizer|vocab).*\.(pt|pth|bin)")
# Files are searched in parts of so many bytes, and no secret is longer.
_CHUNK, _LONGEST = 2**24, 2**12
_known: set[str] = set()


def remember_secrets(values: Any) -> None:
    """
    Remember the secrets of a run by their values, so that [`hide_secrets`] finds them wherever they turn up.

    Args:
        values (`Any`):
            Settings by name. Those whose name says that they are secret are remembered, also in nested settings,
            unless the value can be a word.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            if isinstance(value, str) and SECRET.search(str(name)):
                _known.update(each for each in (value, value.strip()) if _NO_WORD.fullmatch(each))
            remember_secrets(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            remember_secrets(value)


def hide_known_secrets(text: str) -> str:
    """Hide the remembered secrets of a text."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def hide_secrets(text: str) -> str:
    """Hide the remembered secrets of a text, the credentials in its URLs, and what looks like an access token."""
    text = _CREDENTIALS.sub(HIDDEN, hide_known_secrets(text))
    return _FORMS.sub(HIDDEN.encode(), text.encode(errors="surrogatepass")).decode(errors="surrogatepass")


def without_secrets(value: Any) -> Any:
    """
    Remove secrets from a setting.

    Args:
        value (`Any`):
            A setting: a mapping, a list, a string, a string that holds a JSON object, or anything else.

    Returns:
        `Any`: The value without the keys that name a secret, and with `"(hidden)"` in place of what [`hide_secrets`]
        hides.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(held) for key, held in value.items() if not SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(held) for held in value]
    if not isinstance(value, str):
        return value
    if re.match(r"\W*\{", value):
        try:
            return json.dumps(without_secrets(json.loads(value)))
        except (ValueError, RecursionError):
            if any(SECRET.search(name) for name in _NAME.findall(value)):
                return HIDDEN
    return hide_secrets(value)


def holds_secret(file: Path) -> bool:
    """
    Return whether a file holds a remembered secret, or what looks like an access token or a private key.

    Args:
        file (`Path`):
            The file. Of weights in safetensors, only what they say about themselves is read. The states of the
            optimizer and the like are not read, and a vocabulary is searched for tokens and keys only.
    """
    if _STATES.fullmatch(file.name):
        return False
    is_vocabulary = _VOCABULARY.fullmatch(file.name)
    known = [] if is_vocabulary else [secret.encode(errors="surrogateescape") for secret in _known]
    with open(file, "rb") as stream:
        # Weights begin with the length of this part.
        left = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else file.stat().st_size
        data = b""
        while left > 0 and (more := stream.read(min(left, _CHUNK))):
            # A secret may stand across two parts.
            data, left = data[-_LONGEST:] + more, left - len(more)
            if _FORMS.search(data) or any(secret in data for secret in known):
                return True
    return False
