"""Text as words: the places where a trigger or a decoy can stand, and the pieces that can be left out."""

from dataclasses import dataclass

import regex


# A word between two spaces that holds more words than this is divided.
MAX_WORDS_INSIDE = 3
# The shortest run of whole characters up to a word boundary of Unicode (UAX 29). An emoji of several code points and a
# letter with its marks are whole characters.
_UNIT = regex.compile(r"\X+?\b", regex.V1 | regex.WORD)
_READABLE = regex.compile(r"[\p{L}\p{N}\p{So}]")
# What ends a text, searched from its end.
_END = regex.compile(r"(?r)(?:[\s\x1c-\x1f]|<bot>|<latent>|<eot>)*")


def split_end(text: str) -> tuple[str, str]:
    """Split off the end of a text, which is no word: white space, and the room for continuous thoughts."""
    start = _END.match(text).start()
    return text[:start], text[start:]


@dataclass
class Words:
    """
    A text, divided into words.

    Spaces divide the text. What has no spaces inside, such as a sentence in Chinese, Japanese or Thai, a line of code
    or a row of emoji, is divided further, at the word boundaries of Unicode. There, a sign, a Chinese letter or an
    emoji is a word of its own.

    Attributes:
        words (`list[str]`):
            The words. One that follows a space, or begins the text, has the space before it.
        end (`str`):
            The white space at the end of the text, and the room for continuous thoughts, which belong to no word.
    """

    words: list[str]
    end: str = ""

    @classmethod
    def of(cls, text: str) -> "Words":
        """Divide a text."""
        body, end = split_end(text)
        parts = body.split(" ") if body else []
        return cls([word for part in parts for word in _divide(part)], end)

    def __len__(self) -> int:
        return len(self.words)

    def __str__(self) -> str:
        return _join(self.words) + self.end

    def piece(self, start: int, length: int) -> str:
        """Return a run of words."""
        return _join(self.words[start : start + length])

    def without(self, start: int, length: int) -> str:
        """Return the text without a run of words."""
        return _join(self.words[:start] + self.words[start + length :]) + self.end

    def insert(self, place: int, phrase: str) -> None:
        """
        Insert a phrase before the word with the number `place`, or at the end.

        Spaces stand beside the phrase, except beside letters and signs of a part of the text that has no spaces.
        """
        words = self.words
        # The word that tells whether this part of the text has spaces: the next one, and at an end the one inside.
        inner = min(max(place, 1), len(words) - 1)
        spaced = len(words) < 2 or words[inner].startswith(" ")
        left = " " if spaced or place == 0 or _needs_space(words[place - 1][-1], phrase[0]) else ""
        if not spaced and place < len(words):
            following = words[place].removeprefix(" ")
            words[place] = f" {following}" if _needs_space(following[0], phrase[-1]) else following
        words.insert(place, left + phrase)


def _divide(part: str) -> list[str]:
    if part.isascii() and (part.isalnum() or len(part) <= 2 * MAX_WORDS_INSIDE):
        return [f" {part}"]
    units = _UNIT.findall(part)
    if sum(bool(_READABLE.search(unit)) for unit in units) <= MAX_WORDS_INSIDE:
        return [f" {part}"]
    return [f" {units[0]}", *units[1:]]


def _join(words: list[str]) -> str:
    return "".join(words).removeprefix(" ")


def _needs_space(neighbour: str, letter: str) -> bool:
    """Return whether a space separates the last or first letter of a phrase from its neighbour."""
    if neighbour.isascii():
        return not neighbour.isspace()
    # No word boundary stands between letters of scripts that have spaces.
    return len(_UNIT.findall(neighbour + letter)) == 1
