"""README's reading path: it names files that exist, at the length that it says, and pages that can be opened."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.search(r"^## Reading the code\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
ROWS = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \|", SECTION, re.MULTILINE)
TOLERANCE = 0.2


def test_files_of_the_reading_path_are_as_long_as_it_says():
    """A newcomer goes by this table: each file is there, and its length is within a fifth of the stated one."""
    assert len(ROWS) == SECTION.count("\n| `") > 10, "a row of the table has the form | `file` | lines | what it is |"
    wrong = []
    for name, stated in ROWS:
        file = ROOT / name
        lines = len(file.read_text().splitlines()) if file.is_file() else 0
        if not lines:
            wrong.append(f"{name} does not exist: name the file that took its place")
        elif abs(lines - int(stated.replace(",", ""))) > TOLERANCE * lines:
            wrong.append(f"{name} has {lines} lines, not {stated}: write {lines}")
    assert not wrong, "README.md, Reading the code:\n" + "\n".join(wrong)


def test_pages_that_the_section_links_exist():
    """Its links are the way into the documentation."""
    pages = re.findall(r"\]\(([^)#]+)\)", SECTION)
    assert {"docs/algorithm.md", "docs/architecture.md", "CONTRIBUTING.md"} <= set(pages)
    assert not [page for page in pages if not (ROOT / page).is_file()]
