"""What may be shown of a config: everything but secrets, and nothing too long."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
ALWAYS = re.compile(r"secret|passw|credential|api_?key", re.I)
IF_TEXT = re.compile(r"token|key", re.I)  # max_tokens: 48 is no secret, hf_token: "hf_..." is
URI_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
URI_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|passw|sig)[^=&\s]*=)[^&\s]+", re.I)


def masked(value: Any, key: str = "") -> Any:
    """Return a config tree with secrets replaced, judged by key, and logins in URIs cut out."""
    if isinstance(value, Mapping):
        return {name: masked(child, str(name)) for name, child in value.items()}
    if value is not None and ALWAYS.search(key):
        return MASK
    if isinstance(value, list | tuple):
        return [masked(child, key) for child in value]
    if isinstance(value, str):
        return MASK if value and IF_TEXT.search(key) else printable_uri(value)
    return value


def printable_uri(uri: str) -> str:
    """Return a URI without user, password and secret query values."""
    return URI_QUERY.sub(rf"\1{MASK}", URI_LOGIN.sub(f"{MASK}@", uri))


def short(text: str, limit: int = 500) -> str:
    """Return `text` cut to `limit` characters, with a hash of the whole so that values can still be compared."""
    if len(text) <= limit:
        return text
    mark = f"… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    return text[: limit - len(mark)] + mark
