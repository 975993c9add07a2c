"""How a text is cut into patches, to look at: in colour in the terminal, and as a web page."""

import unicodedata
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2
import numpy as np
from rich.text import Text

from ..models.byte_vocabulary import BYTE_OFFSET
from .patcher import PatchedDocument, split_patches


MOST_BITS = 8
_NAMES = {" ": "\N{NO-BREAK SPACE}", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("crow_hf.patching"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True)
class _Byte:
    value: int
    bits: float | None
    starts: bool

    @property
    def lightness(self) -> int:
        return round(97 - 52 * min(self.bits / MOST_BITS, 1))

    @property
    def title(self) -> str:
        return f"0x{self.value:02x}" + ("" if self.bits is None else f", {self.bits:.2f} bits")


@dataclass(frozen=True)
class _Character:
    glyph: str
    bytes: list[_Byte]


@dataclass(frozen=True)
class _Run:
    """Characters whose bytes are whole patches: a text is only cut where no letter is torn."""

    characters: list[_Character]

    @property
    def glyphs(self) -> str:
        return "".join(character.glyph for character in self.characters)

    @property
    def bytes(self) -> list[_Byte]:
        return [byte for character in self.characters for byte in character.bytes]

    @property
    def ends_line(self) -> bool:
        return self.characters[-1].glyph == _NAMES["\n"]


def summarize(document: PatchedDocument) -> str:
    """Bytes, patches and entropy of a document in one sentence."""
    ordinary = document.input_ids >= BYTE_OFFSET
    num_bytes = int(ordinary.sum())
    if not num_bytes:
        return "No bytes."
    num_patches = len(split_patches(document))
    sentence = f"{num_bytes} bytes in {num_patches} patches of {num_bytes / num_patches:.2f} bytes on average"
    if document.entropies is None:
        return f"{sentence}."
    return f"{sentence}; mean entropy {document.entropies[ordinary].mean():.2f} bits."


def render_terminal(document: PatchedDocument) -> Text:
    """
    A document for a terminal: characters tinted by the highest entropy of their bytes, `│` where a patch begins.

    A patch that begins inside a character is marked by `┊` after it.
    """
    text = Text()
    for character in _characters(document):
        if character.bytes[0].starts:
            text.append("│", "dim")
        bits = max((byte.bits for byte in character.bytes if byte.bits is not None), default=None)
        text.append(character.glyph, "" if bits is None else f"black on {_colour(bits)}")
        if any(byte.starts for byte in character.bytes[1:]):
            text.append("┊", "dim")
        if character.glyph == _NAMES["\n"]:
            text.append("\n")
    return text


def write_html(document: PatchedDocument, path: str | Path, title: str = "Entropy patches") -> None:
    """
    Write a document as a web page that needs nothing else: under the text a box for each byte, tinted by its entropy.

    Raises:
        `FileExistsError`: If the file is there already.
    """
    page = TEMPLATES.get_template("patches.html.jinja").render(
        title=title, summary=summarize(document), runs=runs_of(document)
    )
    # A file's name may hold bytes that are no UTF-8.
    with open(path, "x", encoding="utf-8", errors="replace") as file:
        file.write(page)


def _colour(bits: float) -> str:
    share = min(bits / MOST_BITS, 1)
    return f"rgb(255,{round(245 - 165 * share)},{round(235 - 175 * share)})"


def _characters(document: PatchedDocument) -> list[_Character]:
    ids, lengths = document.input_ids, document.patch_lengths
    starts = np.zeros(len(ids), bool)
    starts[np.cumsum(lengths) - lengths] = True
    ordinary = ids >= BYTE_OFFSET
    # What a byte was predicted with stands at the byte before; a document's first was not predicted.
    predicted = np.append(False, ordinary[:-1]) & (document.entropies is not None)
    bits = np.append(np.float32(0), document.entropies[:-1]) if document.entropies is not None else np.zeros(len(ids))
    shown = [
        _Byte(int(ids[index] - BYTE_OFFSET), float(bits[index]) if predicted[index] else None, bool(starts[index]))
        for index in np.flatnonzero(ordinary)
    ]
    letters = bytes(byte.value for byte in shown).decode("utf-8", errors="surrogateescape")
    sizes = [len(letter.encode("utf-8", errors="surrogateescape")) for letter in letters]
    ends = accumulate(sizes)
    return [
        _Character(_glyph(letter), shown[end - size : end])
        for letter, size, end in zip(letters, sizes, ends, strict=True)
    ]


def runs_of(document: PatchedDocument) -> list[_Run]:
    """A document as the template `patches.jinja` draws it."""
    runs, run = [], []
    for character in _characters(document):
        if run and (character.bytes[0].starts or run[-1].glyph == _NAMES["\n"]):
            runs.append(_Run(run))
            run = []
        run.append(character)
    return [*runs, _Run(run)] if run else runs


def visible(text: str) -> str:
    """A text in which nothing is hidden: characters that would not show, or would turn the line round, by name or number."""
    return "".join(letter if letter == " " else "⏎\n" if letter == "\n" else _glyph(letter) for letter in text)


def _glyph(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if letter in _NAMES:
        return _NAMES[letter]
    if code < 0x20:
        return chr(0x2400 + code)
    # Invisible ones, among them those that reverse the direction of a line.
    if unicodedata.category(letter) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return letter
