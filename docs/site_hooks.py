"""Hooks of `make docs`: links to files outside docs/ work in a checkout, but the site does not have those files."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Leaves the text of such links in the place of the links."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
