"""The report in Chromium without network: on a phone, on a desktop, in dark mode and in print."""

import numpy as np
import pytest
from run_folders import change, figures, make_run, read

from pkd_dist.evaluation.calibration import calibrate
from pkd_dist.report import pages

WIDTHS = (400, 1280)
RENDERED = """() => [...document.querySelectorAll('svg, img')].map(drawing => {
    const box = drawing.getBoundingClientRect()
    const shapes = [...drawing.querySelectorAll('path, use')].filter(shape => shape.getBoundingClientRect().width > 0)
    return [box.width, box.height, shapes.length, drawing.getAttribute('aria-label') || drawing.getAttribute('alt')]
})"""
OVERFLOWING = """() => [...document.querySelectorAll('main *')].filter(element =>
    !element.closest('.scroll, svg') && element.getBoundingClientRect().right > innerWidth + 0.5
).map(element => element.outerHTML.slice(0, 200))"""
TRADEOFFS = "svg[aria-label*=' and size: '], svg[aria-label*=' and latency: ']"
COVERING = """plots => plots.flatMap(plot => {
    const texts = [...plot.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])
    return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([_, b]) =>
        a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1
    ).map(([other]) => [one, other]))
})"""
CONTRAST = """() => {
    const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number)
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b)
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor)
            if (colour.length < 4 || colour[3] > 0) return colour
        }
        return [255, 255, 255]
    }
    const ratios = {}
    for (const element of document.querySelectorAll('main *')) {
        if (element.closest('svg') || ![...element.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue
        const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))]
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
        if (ratio < 4.5) ratios[element.outerHTML.slice(0, 100)] = ratio
    }
    return ratios
}"""


def add_splits(out):
    sides = {side: figures(value, False) for side, value in (("teacher", 0.713), ("student", 0.694))}
    part = {"n": 12345, **sides, "agreement": 0.877}
    out["results"]["splits"] = {"dev_mismatched": part, "test": part, "a_split_of_a_long_name": part}


def add_calibration(out):
    rng = np.random.default_rng(0)
    given = 3 * rng.normal(size=(300, 2)), rng.integers(2, size=300)
    names = ("dev", "test", "a_split_of_a_long_name")
    out["results"]["calibration"] = calibrate(*(dict.fromkeys(names, each) for each in given))


def add_long_note(out):
    out["sets"]["train"]["notes"] = [
        "/a/folder/with_a_very_long_name_that_has_no_place_to_break/" * 3 + "train.tsv: 3 rows are left out"
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Map the name of a run to its report."""
    top = tmp_path_factory.mktemp("pages")
    binary = make_run(top / "binary/run")
    change(binary, "evaluate", add_splits)
    change(binary, "evaluate", add_calibration)
    change(binary, "data", add_long_note)
    names = tuple(f"class number {i}: {'a_long_name_without_spaces' * (1 + i % 3)}" for i in range(150))
    runs = {
        "binary": binary,
        "regression": make_run(top / "regression/run", regression=True),
        "many": make_run(top / "many/run", names=names),
        "few": make_run(top / "few/run", names=("contradiction", "entailment", "neutral", "<b>&amp;", "負")),
    }
    out = {name: run / "report.html" for name, run in runs.items()}
    for run in runs.values():
        pages.write(read(run), run / "report.html")
    return out


@pytest.fixture(params=["binary", "regression", "many", "few"])
def page_file(made, request):
    return made[request.param]


def opened(chromium, file, width=1280, **options):
    """Return the page, and its requests and console messages."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    page, seen = context.new_page(), []
    page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("request", lambda request: seen.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    return page, seen


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_nothing_is_requested_and_everything_is_drawn(chromium, page_file, width):
    page, seen = opened(chromium, page_file, width)
    assert seen == [page_file.as_uri()], "one file, no messages"
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    drawings = page.evaluate(RENDERED)
    assert len(drawings) >= 6
    for wide, high, shapes, label in drawings:
        assert wide > 100 and high > 40 and shapes > 3, label
        assert label, "every drawing has a text alternative"
    for region in page.locator(".scroll").all():
        assert region.get_attribute("aria-label") and region.get_attribute("tabindex") == "0"
    picture = page.screenshot(full_page=True)
    assert len(picture) > 50_000
    page.context.close()


def test_no_label_of_a_file_covers_another(chromium, page_file):
    page, _ = opened(chromium, page_file)
    plots = page.locator(TRADEOFFS)
    assert plots.count() == 2 and plots.evaluate_all(COVERING) == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(chromium, page_file, scheme):
    page, _ = opened(chromium, page_file, color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 29)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) == {}
    page.context.close()


def test_print(chromium, page_file):
    page, _ = opened(chromium, page_file, width=700, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 700, "the width of A4 between its margins is 688"
    assert page.evaluate(CONTRAST) == {}
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.context.close()


def test_headings_and_landmarks(chromium, made):
    page, _ = opened(chromium, made["binary"])
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    labelled = page.evaluate("[...document.querySelectorAll('section')].map(s => s.getAttribute('aria-labelledby'))")
    assert all(page.locator(f"#{place}").count() == 1 for place in labelled)
    assert page.evaluate("[...document.querySelectorAll('th')].every(cell => cell.scope)")
    assert page.get_by_role("table").count() >= 4
    assert "of the teacher's accuracy (dev)" in page.locator("header").inner_text()
    page.context.close()


def test_the_other_classes_unfold(chromium, made):
    page, _ = opened(chromium, made["many"], 400)
    rows = page.locator("details tbody tr")
    assert rows.count() == 130 and not rows.first.is_visible()
    page.get_by_text("The other 130 classes").click()
    assert rows.first.is_visible()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    page.context.close()
