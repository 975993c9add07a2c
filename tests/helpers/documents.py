"""Random documents, and a parser of the page that shows a patched document."""

from html.parser import HTMLParser

import numpy as np


def words(letters, length, seed=0):
    """Return random bytes from `letters`."""
    return bytes(np.random.default_rng(seed).choice(list(letters), length).astype(np.uint8))


class Page(HTMLParser):
    """Collects the text, the boxes and the tags of a page."""

    def __init__(self, path):
        super().__init__()
        self.glyphs, self.boxes, self.tags, self.inside = "", [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("class") == "glyphs"
        if tag == "i":
            self.boxes.append(dict(attrs))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.glyphs += data if self.inside else ""
