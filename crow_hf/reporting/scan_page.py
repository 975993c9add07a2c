"""The page of a scan, without external resources."""

from typing import Any

from .html import TEMPLATES, short_name
from .words import percent


FOUND = "There are findings"
NOTHING = "Nothing was found"


def render_scan(result: dict[str, Any], model: str) -> str:
    """
    Draw the page of a scan.

    Args:
        result (`dict`):
            The result as [`Scan.to_dict`] returns it.
        model (`str`):
            The name of the model that was scanned.

    Returns:
        `str`: The page.
    """
    return TEMPLATES.get_template("scan.html.jinja").render(
        result,
        headline=FOUND if result["has_findings"] else NOTHING,
        level="bad" if result["has_findings"] else "unknown",
        short_name=short_name(model),
        percent=percent,
    )
