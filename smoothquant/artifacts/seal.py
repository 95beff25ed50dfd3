"""JSON objects that carry the SHA-256 of their own content, under the key `sha256`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its digest."""
    return {**content, KEY: digest(content)}


def opened(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object without its digest; None if it is not the one that was sealed."""
    inner = {key: value for key, value in content.items() if key != KEY}
    return inner if content.get(KEY) == digest(inner) else None


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over a JSON object, 64 hex digits. It does not depend on the order of keys or on spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
