"""The pages in a real browser: what they show, that stored text runs nothing, and what a visitor can do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from served import Served

HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script></article>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skipped where the machine has none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-background-networking",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=quiet)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page; the test fails on any error that it reports."""
    context = browser.new_context()
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    yield opened
    context.close()
    assert not errors


def test_a_visitor_looks_searches_edits_forgets_and_brings_back(tmp_path: Path, page: Any) -> None:
    with Served(tmp_path) as served:
        page.goto(f"{served.base}/")
        assert page.url.endswith("/ui")
        page.fill("#note", "My cat is called Tom")
        page.click("button:text-is('Remember')")
        assert "My cat is called Tom" in page.inner_text("article")
        page.click("nav >> text=Search")
        page.fill("#q", "what is the cat called?")
        page.press("#q", "Enter")
        assert page.inner_text(".hit .text") == "My cat is called Tom"
        assert page.locator(".parts tr").count() >= 1
        page.click(".hit >> text=open")
        assert page.locator("svg.curve polyline").count() == 1
        page.fill("#text", "My cat is called Felix")
        page.click("button:text-is('Save')")
        assert page.input_value("#text") == "My cat is called Felix"
        page.click("button:has-text('can be undone')")
        assert "Felix" in page.inner_text("article")
        page.click("button:text-is('Bring back')")
        assert page.input_value("#text") == "My cat is called Felix"
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("button:text-is('Erase for good')")
        assert page.url.endswith("/ui")
        assert page.locator("article").count() == 0
        page.goto(f"{served.base}/ui/deleted")
        assert page.locator("article").count() == 0


def test_stored_text_is_shown_as_text_on_every_page(tmp_path: Path, page: Any) -> None:
    with Served(tmp_path) as served:
        with served.client() as http:
            (id,) = http.post("/memories", json={"user": HOSTILE, "assistant": HOSTILE}).json()["ids"]
        for path in (
            "/ui",
            "/ui/search?q=document+title+owned",
            "/ui/fading",
            f"/ui/memory/{id}",
            "/ui/held",
        ):
            page.goto(served.base + path)
            assert page.title() != "owned"
            assert page.locator("img, script:not([src])").count() == 0
        page.goto(f"{served.base}/ui")
        assert "<script>" in page.inner_text("article")


def test_signing_in_needs_a_key_and_signing_out_ends_it(tmp_path: Path, page: Any) -> None:
    with Served(tmp_path, users=("emily", "bob")) as served:
        with served.client("emily") as http:
            http.post("/memories", json={"text": "Emily's own note"})
        page.goto(f"{served.base}/ui")
        assert page.url.endswith("/ui/login")
        page.fill("#key", served.keys["emily"])
        page.click("button:has-text('Sign in')")
        assert "Emily's own note" in page.inner_text("article")
        cookie = page.context.cookies()[0]
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        assert served.keys["emily"] not in cookie["value"]
        page.click("button:text-is('Sign out')")
        page.goto(f"{served.base}/ui")
        assert page.url.endswith("/ui/login")


def test_everything_is_erased_only_after_the_name_was_typed(tmp_path: Path, page: Any) -> None:
    with Served(tmp_path) as served, served.client() as http:
        http.post("/memories", json={"text": "to be erased"})
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{served.base}/ui/held")
        page.fill("#name", "somebody else")
        page.click("button.bad")
        assert "nothing was erased" in page.inner_text("[role=alert]")
        assert http.get("/memories").json()["memories"]
        page.fill("#name", "me")
        page.click("button.bad")
        assert http.get("/memories").json()["memories"] == []


def test_a_narrow_screen_never_scrolls_sideways(tmp_path: Path, page: Any) -> None:
    with Served(tmp_path) as served:
        with served.client() as http:
            (id,) = http.post("/memories", json={"user": "x" * 500, "assistant": "word " * 200}).json()["ids"]
        page.set_viewport_size({"width": 360, "height": 740})
        for path in ("/ui", "/ui/search?q=word", f"/ui/memory/{id}", "/ui/held", "/ui/fading"):
            page.goto(served.base + path)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


def test_pages_work_without_scripts(tmp_path: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    try:
        with Served(tmp_path) as served:
            page = context.new_page()
            page.goto(f"{served.base}/ui")
            page.fill("#note", "no script was needed")
            page.click("button:text-is('Remember')")
            assert "no script was needed" in page.inner_text("article")
    finally:
        context.close()
