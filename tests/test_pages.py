# SPDX-License-Identifier: Apache-2.0
"""Every page can be found, and every link of a page leads somewhere."""

import re
from pathlib import Path

import pytest

from pages import ROOT, anchors, complaints, navigation, wrong_link


def test_links_and_navigation_are_in_order() -> None:
    assert list(complaints()) == []


def test_each_page_is_in_the_navigation_once() -> None:
    assert len(navigation()) == len(set(navigation())) > 10


def test_headings_have_the_anchors_that_github_makes() -> None:
    page = "# A page\n```sh\n# no heading\n```\n## Two\n## Two\n## `x`: and_y, [z](a.md)\n"

    assert anchors(page) == {"a-page", "two", "two-1", "x-and_y-z"}


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("settings.md#limits", ""),
        ("#read-its-metrics", "no such heading"),
        ("nothing.md", "no such file"),
        ("settings.md#nothing", "no such heading"),
        ("../../elsewhere", "no such file"),
        ("/etc/passwd", "outside of the tree"),
        ("https://xenbits.xen.org/docs/", ""),
        ("https://xenbits", "no address of the web"),
        ("file:///etc/passwd", "no address of the web"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(target: str, why: str) -> None:
    assert wrong_link(ROOT / "docs" / "tutorial.md", target) == why


def test_a_list_begins_after_an_empty_line() -> None:
    """Else the site shows it as part of the paragraph, where GitHub shows a list."""
    found = []
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += re.findall(r"^(?![-|#>\s]|\d+\. |<!--).*\n(?:- |\d+\. ).*", text, re.MULTILINE)
    assert found == []


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    text = Path(ROOT / "mkdocs.yml").read_text()

    assert "font: false" in text
    assert "http" not in text
