"""Links and pictures lead somewhere; the site's own build checks them again, `make docs`."""

from __future__ import annotations

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links


def leads_somewhere(page: str, link: str) -> bool:
    """Whether a link of a page leads to a file, and to a heading in it if it names one."""
    path, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
    if not target.is_file():
        return False
    return not anchor or anchor in anchors(str(target.relative_to(ROOT)))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert [link for link in links(page) if not leads_somewhere(page, link)] == []


def test_there_are_links_to_check() -> None:
    assert "docs/pictures/front.png" in links("README.md")
    assert "clusters.md#schedules" in links("docs/run-a-sweep.md")
    assert "api/pruners.md" in links("docs/index.md")  # whose text is code


def test_a_broken_link_is_found() -> None:
    assert leads_somewhere("docs/index.md", "clusters.md#schedules")
    assert not leads_somewhere("docs/index.md", "clusters.md#timetables")
    assert not leads_somewhere("docs/index.md", "docs/clusters.md")


def test_an_anchor_is_what_sites_make_of_a_heading() -> None:
    assert "1-run-a-sweep" in anchors("README.md")
    assert "steps" in anchors("docs/sweep-keys.md")  # `[[steps]]`
    assert "the-walk-where-is-what" in anchors("CONTRIBUTING.md")


def test_no_page_stands_outside_the_site() -> None:
    """Pages of docs/ are in the site's navigation, each once."""
    configuration = (ROOT / "zensical.toml").read_text()
    for page in PAGES:
        if page.startswith("docs/"):
            assert configuration.count(f'"{page.removeprefix("docs/")}"') == 1, page
