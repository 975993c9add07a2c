"""Views of a patched document: colours in the terminal, and a web page."""

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import jinja2
import numpy as np
import torch
from markupsafe import Markup, escape
from rich.text import Text

from ..data.visible import glyph, visible
from ..files import write_text
from ..models.boundaries import MOST_BITS, PatchRule, patch_starts
from ..models.byte_vocabulary import BYTE_OFFSET
from .documents import PatchedDocument, split_patches


_LINE_FEED = glyph("\n")
# Whatever a page shows is visible, wherever it comes from.
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("crow_hf.patching"),
    autoescape=True,
    finalize=lambda value: visible(value) if type(value) is str else value,
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
    """Characters whose bytes are whole patches. A run never ends inside a character."""

    characters: list[_Character]

    @property
    def glyphs(self) -> Markup:
        return escape("".join(character.glyph for character in self.characters))

    @property
    def bytes(self) -> list[_Byte]:
        return [byte for character in self.characters for byte in character.bytes]

    @property
    def ends_line(self) -> bool:
        return self.characters[-1].glyph == _LINE_FEED


def summarize(document: PatchedDocument) -> str:
    """Return a sentence with the number of bytes, the number of patches and the mean entropy."""
    ordinary = document.input_ids >= BYTE_OFFSET
    num_bytes = int(ordinary.sum())
    if not num_bytes:
        return "No bytes."
    num_patches = len(split_patches(document))
    sentence = f"{num_bytes} bytes in {num_patches} patches of {num_bytes / num_patches:.2f} bytes on average"
    if document.entropies is None:
        return f"{sentence}."
    return f"{sentence}; mean entropy {document.entropies[ordinary].mean():.2f} bits."


def describe_rule(document: PatchedDocument, rule: PatchRule) -> str:
    """
    Say in which unit the rule's thresholds are, and how often each of them decides.

    Args:
        document (`PatchedDocument`):
            A document that was cut by this rule.
        rule (`PatchRule`):
            The rule.

    Returns:
        `str`: A sentence for each threshold that the rule uses, with the share of the bytes that exceed it.
    """
    parts = {"global": (rule.threshold, "entropy"), "monotonic": (rule.relative_threshold, "rise of the entropy")}
    if document.entropies is None:
        return f"The rule {rule.rule} uses no entropies."
    ids, entropies = (torch.from_numpy(values)[None] for values in (document.input_ids, document.entropies))
    # The first byte of a text is not predicted.
    predicted = torch.from_numpy(np.append(False, document.input_ids[:-1] >= BYTE_OFFSET))
    predicted &= ids[0] >= BYTE_OFFSET
    sentences = []
    for part, (share, name) in parts.items():
        if rule.rule in (part, "either", "both", "running_minimum"):
            alone = replace(rule, rule=part, reset_on_newline=False, max_patch_length=None)
            exceeded = patch_starts(ids, entropies, alone)[0][predicted].float().mean().item()
            sentences.append(
                f"The {name} exceeds {share:.4g} of the largest ({MOST_BITS * share:.3g} bits) at {exceeded:.1%} of "
                "the bytes."
            )
    return " ".join(sentences)


def render_terminal(document: PatchedDocument) -> Text:
    """
    Render a document for the terminal.

    Each character is tinted by the highest entropy of its bytes. `│` marks the beginning of a patch. `┊` after a
    character marks a patch that begins inside it.
    """
    text = Text()
    for character in _characters(document):
        if character.bytes[0].starts:
            text.append("│", "dim")
        bits = max((byte.bits for byte in character.bytes if byte.bits is not None), default=None)
        text.append(character.glyph, "" if bits is None else f"black on {_colour(bits)}")
        if any(byte.starts for byte in character.bytes[1:]):
            text.append("┊", "dim")
        if character.glyph == _LINE_FEED:
            text.append("\n")
    return text


def write_html(document: PatchedDocument, path: str | Path, title: str = "Entropy patches") -> None:
    """
    Write a document as a self-contained web page. Below the text, each byte has a box tinted by its entropy.

    Args:
        document (`PatchedDocument`):
            The document.
        path (`str` or `Path`):
            The new file.
        title (`str`, *optional*, defaults to `"Entropy patches"`):
            The page's title.

    Raises:
        `FileExistsError`: If the file exists.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already.")
    page = TEMPLATES.get_template("patches.html.jinja").render(
        title=title, summary=summarize(document), runs=runs_of(document)
    )
    # A title made from a file name may hold bytes that are not UTF-8.
    write_text(Path(path), page.encode(errors="replace").decode())


def _colour(bits: float) -> str:
    share = min(bits / MOST_BITS, 1)
    return f"rgb(255,{round(245 - 165 * share)},{round(235 - 175 * share)})"


def _characters(document: PatchedDocument) -> list[_Character]:
    ids, lengths = document.input_ids, document.patch_lengths
    starts = np.zeros(len(ids), bool)
    starts[np.cumsum(lengths) - lengths] = True
    ordinary = ids >= BYTE_OFFSET
    # The entropy of the prediction of a byte is stored at the byte before. The first byte was not predicted.
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
        _Character("\N{NO-BREAK SPACE}" if letter == " " else glyph(letter), shown[end - size : end])
        for letter, size, end in zip(letters, sizes, ends, strict=True)
    ]


def runs_of(document: PatchedDocument) -> list[_Run]:
    """Return the document as runs of characters, the input of the template `patches.jinja`."""
    runs: list[_Run] = []
    run: list[_Character] = []
    for character in _characters(document):
        if run and (character.bytes[0].starts or run[-1].glyph == _LINE_FEED):
            runs.append(_Run(run))
            run = []
        run.append(character)
    return [*runs, _Run(run)] if run else runs
