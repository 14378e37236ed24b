"""Pages of the documentation: every picture is described and can be made again, and no page is a dead end."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import tables  # noqa: E402

PAGES = {str(path.relative_to(ROOT)): path for path in tables.pages()}
COMMAND = re.compile(r"(?:jaxlimit (?:run|experiment)|python benchmarks/\w+\.py)[^`\n]*")
PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]*)\)")
HEADING = re.compile(r"^#+ .*$", flags=re.MULTILINE)


def pictures(text):
    """Each picture with the text of its section before it, and all of that text."""
    for picture in PICTURE.finditer(text):
        ends = [heading.end() for heading in HEADING.finditer(text, 0, picture.start())]
        following = HEADING.search(text, picture.end())
        before = text[ends[-1] : picture.start()]
        yield picture, before, before + text[picture.end() : following.start() if following else len(text)]


FIGURES = [
    pytest.param(name, *found, id=f"{name}-{Path(found[0]['path']).stem}")
    for name, path in PAGES.items()
    for found in pictures(path.read_text())
]


@pytest.mark.parametrize(("page", "picture", "before", "section"), FIGURES)
def test_every_figure_is_described_and_has_its_command_beside_it(page, picture, before, section):
    file = PAGES[page].parent / picture["path"]
    assert file.is_file()
    assert len(picture["alt"].split()) >= 5, "a text for who cannot see it"
    commands = COMMAND.findall(section)
    assert commands, "a section with a figure names the command that makes it"
    for script in re.findall(r"benchmarks/\w+\.py", " ".join(commands)):
        assert (ROOT / script).is_file()
    experiment, _, preset = file.stem.partition("-")
    results = ROOT / "benchmarks" / "results" / f"{experiment}_{preset}.json"
    if results.is_file():  # of an experiment: the nearest command is the one that was run
        assert COMMAND.findall(before)[-1].startswith(json.loads(results.read_text())["command"])


@pytest.mark.parametrize("page", [name for name in PAGES if re.fullmatch(r"docs/\w+\.md", name)])
def test_every_page_says_what_it_is_for_and_where_to_go_next(page):
    lines = PAGES[page].read_text().strip().splitlines()
    assert lines[0].startswith("# ")
    assert re.match(r"[\w`*]", lines[2]), "after the title a sentence, before any table, code or heading"
    assert lines[-1].startswith("Next: [") or "\nNext: [" in "\n".join(lines[-3:])


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_plain_text(page):
    """Neither the site nor a repository's web view sets this kind of formula."""
    assert not re.search(r"\\[(\[]|\\(?:frac|sum|mu|lambda)\b", PAGES[page].read_text())


def anchors(text):
    """What the headings of a page are called in links."""
    words = [re.sub(r"[^\w\s-]", "", heading[0].lstrip("# ")).strip() for heading in HEADING.finditer(text)]
    return {re.sub(r"[-\s]+", "-", heading).lower() for heading in words}


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_arrive(page):
    """The site's own check comes late: it takes a build."""
    text = PAGES[page].read_text()
    for name, anchor in re.findall(r"\]\(([\w/]*?\w*\.md|)#([\w-]+)\)", text):
        target = PAGES[page].parent / name if name else PAGES[page]
        if target.parent.name != "api":  # whose anchors are names of Python
            assert anchor in anchors(target.read_text()), f"{name}#{anchor}"
