"""training.settings"""

import json
import re
from collections.abc import Mapping
from typing import Any


SECRET = re.compile(r"(^|[_-])(token|password|secret|api_?key)$", re.IGNORECASE)
HIDDEN = "(hidden)"


def without_secrets(value: Any) -> Any:
    """Without the values of keys that are called tokens, and without what looks like one of the Hub's."""
    if isinstance(value, Mapping):
        return {key: without_secrets(held) for key, held in value.items() if not SECRET.search(str(key))}
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.dumps(without_secrets(json.loads(value)))
        except ValueError:
            return HIDDEN
    return re.sub(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)", HIDDEN, value) if isinstance(value, str) else value
