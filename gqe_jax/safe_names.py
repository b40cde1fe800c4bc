"""Names of files that something from outside gives: checked once, before any path is made of them."""

from typing import Any

from gqe_jax.checked_json import shown
from gqe_jax.config import ConfigError

LONGEST = 255  # bytes of a name, in every file system
FORBIDDEN = frozenset('\\:*?"<>|')  # at least one system takes them for more than letters of a name


def checked_name(name: Any, source: object, *, suffix: str = "") -> str:
    """`name`, if it is that of a file in the folder it belongs to, or in a folder below.

    Args:
      name: what was read: file names joined by "/".
      source: the file that gave it, for the message.
      suffix: what the name must end with.

    Raises:
      ConfigError: it is no text, is absolute, climbs out of the folder (".."), is too long or lies too deep, or holds
        characters that no name has.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    plain = all(part not in ("", ".", "..") and part.isprintable() and not set(part) & FORBIDDEN for part in parts)
    if not plain or not name.endswith(suffix) or len(parts) > 8 or max(len(part.encode()) for part in parts) > LONGEST:
        kind = f" that ends with {suffix}" if suffix else ""
        raise ConfigError(
            f"{source} names the file {shown(name)}, but must name one in its own folder{kind}: do not use it, or "
            f"copy it again from where it came from"
        )
    return name
