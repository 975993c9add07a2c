"""Makes every character of a text visible, because a suspect's files can hold what no reader sees.

Such characters are commands to the terminal, letters that reverse the direction of a line, and blanks that are no
space: fillers, selectors of variants, joiners and more.
"""

import regex


# Characters without a glyph of their own. Three are blank by their drawing alone.
_BLANK = r"[\p{Cc}\p{Cf}\p{Z}\p{Default_Ignorable_Code_Point}\u2800\U00016FE4\U0001D159]"
_HIDDEN = regex.compile(rf"(?! ){_BLANK}|[\p{{Cn}}\p{{Co}}\p{{Cs}}]")
_NOTHING = regex.compile(f"{_BLANK}*")
_NAMES = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def glyph(letter: str) -> str:
    """
    Return a character, or what is written for it if it does not show: a sign, or its code point.

    A byte that is no UTF-8, as Python's `surrogateescape` keeps it, is written as a byte.
    """
    code = ord(letter)
    if not _HIDDEN.match(letter):
        return letter
    if letter in _NAMES:
        return _NAMES[letter]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"


def visible(text: str) -> str:
    """Write out the characters of a text that do not show. A line feed is shown, and still ends its line."""
    return _HIDDEN.sub(lambda found: "⏎\n" if found[0] == "\n" else glyph(found[0]), text)


def printable(text: str) -> str:
    """Write out the characters of a text that do not show, except line feeds and tabs, for the terminal."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in "\n\t" else glyph(found[0]), text)


def is_blank(text: str) -> bool:
    """Return whether nothing of a text shows."""
    return _NOTHING.fullmatch(text) is not None
