"""The page of `serve` in a real browser, Debian's chromium driven by Playwright. Slow.

SCREENSHOTS=FOLDER saves a picture of the page on a wide and on a narrow screen.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from test_serve import serving, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e .[browser]")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium"),
]


REJECTED = "the server responded with a status of 400 (Bad Request)"


@pytest.fixture(scope="module")
def served(tiny):
    with serving(tiny, max_tokens=2000) as (address, made):
        yield address, made


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(served, browser):
    """Open the page; anything on its console, or requested from another site, fails the test."""
    address, made = served
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    messages = []
    page = context.new_page()
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(address) else messages.append(r.url))
    page.goto(address)
    yield page
    context.close()
    assert messages == getattr(page, "expected", [])
    wait_until(lambda: made.counts() == (0, 0))


def fill(page, text, **options):
    page.fill("#seed", text)
    for name, value in options.items():
        page.fill(f"[name={name}]", str(value))


def test_text_appears_while_it_is_generated(tiny, page):
    fill(page, "The import", max_tokens=600, random_seed=3)
    page.click("#go")
    new, status = page.locator(".new"), page.locator("#status")
    wait_until(lambda: new.count() and new.inner_text())
    expect(status).to_have_text("generating …")
    lengths = set()
    wait_until(lambda: lengths.add(len(new.text_content())) or "done" in status.text_content())
    assert len(lengths) > 3
    expect(status).to_have_text("done, seed 3")
    settings = dict(length=600, temperature=0.7, top_k=40, seed=3)
    (expected,) = tiny.generate("The import", **settings)
    assert new.text_content() == expected.text
    assert page.locator(".prompt").text_content() == "The import"


def test_the_button_and_escape_stop_and_keep_the_text(served, page):
    _, made = served
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        fill(page, "The", max_tokens=2000, n=3)
        page.keyboard.press("Control+Enter")
        wait_until(lambda: page.locator(".new").count() == 3)
        wait_until(lambda: page.locator(".new").first.text_content())
        stop()
        expect(page.locator("#status")).to_have_text("stopped")
        wait_until(lambda: made.counts() == (0, 0))
        assert page.locator(".new").first.text_content()
        expect(page.locator("#go")).to_be_enabled()
        expect(page.locator("#stop")).to_be_hidden()


def test_a_prompt_with_html_tags_stays_text(page):
    text = "<script>alert(1)</script>\n  <img src=x onerror=alert(2)>"
    fill(page, text, max_tokens=10, n=2)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    assert [one.text_content() for one in page.locator(".prompt").all()] == [text, text]
    assert page.locator("article img, article script").count() == 0


def test_settings_are_remembered_and_the_prompt_only_within_a_tab(page):
    fill(page, "The\nimport", max_tokens=7, temperature=0.31, top_k=5, n=2)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    page.reload()
    for name, value in (("max_tokens", "7"), ("temperature", "0.31"), ("top_k", "5"), ("n", "2")):
        expect(page.locator(f"[name={name}]")).to_have_value(value)
    expect(page.locator("#seed")).to_have_value("The\nimport")
    again = page.context.new_page()
    again.goto(page.url)
    expect(again.locator("[name=top_k]")).to_have_value("5")


def test_errors_are_shown_below_the_form(page):
    fill(page, "x", max_tokens=99999)
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("max_tokens")
    assert page.locator("article").count() == 0
    page.expected = [f"Failed to load resource: {REJECTED}"]
    fill(page, "x", max_tokens=5, temperature=-1)  # the browser itself rejects this
    page.click("#go")
    assert page.locator("article").count() == 0
    fill(page, "x", temperature=1)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    expect(page.locator("#error")).to_be_hidden()


def test_chinese_and_right_to_left_text(page):
    fill(page, "שלום עולם", max_tokens=5)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    article, prompt = page.locator("article"), page.locator("article .prompt")
    right = article.bounding_box()["x"] + article.bounding_box()["width"]
    box = prompt.bounding_box()
    assert right - (box["x"] + box["width"]) < 40  # the text starts at the right edge
    fill(page, "从前有一座山，" * 8, max_tokens=5)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    assert "从前有一座山" in page.locator(".prompt").text_content()


def test_the_page_works_with_the_keyboard_alone(page):
    page.keyboard.type("The")  # the prompt has the focus
    for _ in range(8):
        page.keyboard.press("Tab")
    expect(page.locator("#go")).to_be_focused()
    page.fill("[name=max_tokens]", "5")
    page.focus("#go")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("done"))


def test_without_javascript_the_page_is_a_form(served, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(served[0])
    fill(page, "\nThe <b>import", max_tokens=10, n=2)
    page.click("#go")
    assert page.locator(".new").count() == 2
    assert page.locator(".prompt").first.text_content() == "\nThe <b>import"
    expect(page.locator("#seed")).to_have_value("\nThe <b>import")
    expect(page.locator("[name=n]")).to_have_value("2")
    context.close()


@pytest.mark.parametrize("width, height, scheme", [(1280, 800, "light"), (390, 844, "dark")])
def test_the_page_fits_wide_and_narrow_screens_in_both_color_schemes(
    served, browser, width, height, scheme
):
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(served[0])
    fill(page, "The import statement", max_tokens=120, n=3, random_seed=4)
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("done"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [one.bounding_box() for one in page.locator("article").all()]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 800)  # in columns, or stacked
    shown = [page.locator(name).first for name in ("body", ".prompt", ".new")]
    colors = [one.evaluate("e => getComputedStyle(e).color") for one in shown]
    red, green, blue = map(int, re.findall(r"\d+", colors[2]))
    assert colors[0] == colors[1] != colors[2] and red > green + 60 and red > blue + 60
    back = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert all(contrast(color, back) >= 4.5 for color in colors)
    for name in ("#go", "#seed"):
        assert page.locator(name).bounding_box()["height"] >= 44  # large enough for a finger
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"page-{width}.png"))
    context.close()


def contrast(one, other):
    """Return the WCAG 2 contrast ratio of two colors given as rgb(r, g, b)."""

    def light(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
