"""What a page holds, and a text that attacks it."""

from html.parser import HTMLParser


ATTACK = "<script>alert(1)</script>\x1b[2J\x00\u202ereversed\u200b\u3164\ufe0f\ud800\"'&{{7*7}}"


class Page(HTMLParser):
    """The elements of a page with their attributes, its text and its ids. Fails if a tag is not closed."""

    VOID = {"meta", "link", "br", "wbr", "path", "circle", "rect"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes, _ in self.elements if tag in tags]
