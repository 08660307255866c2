"""The built book, as a reader meets it: every page opened in a browser, every link followed, nothing fetched from elsewhere.

Reads book/_build/html, which `make book` makes.
"""
import configparser
import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book/_build/html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
DOCS = [TOC["root"]] + [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
CHAPTERS = [doc for doc in DOCS if doc.startswith("nbs/")]
REDIRECTS = yaml.safe_load((ROOT / "book/_config.yml").read_text("utf-8"))["sphinx"]["config"]["redirects"]
DIRECTIVE = re.compile(r"#\s*\|\s*(?:export|hide|eval|default_exp|echo|output)\w*")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

pytestmark = [pytest.mark.book, pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the book has not been built: `make book`")]


@functools.cache
def soup(page):
    return BeautifulSoup((HTML / page).read_text("utf-8"), "html.parser")


def pages():
    found = {str(path.relative_to(HTML)) for path in HTML.rglob("*.html") if "_static" not in path.parts}
    return sorted(found - {f"{old}.html" for old in REDIRECTS})


@functools.cache
def anchors(page):
    return {tag["id"] for tag in soup(page).find_all(id=True)} | {tag["name"] for tag in soup(page).find_all("a", attrs={"name": True})}


def cells(doc):
    notebook = json.loads((ROOT / f"{doc}.ipynb").read_text("utf-8"))
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]


# Pages as files

def test_every_page_of_the_table_of_contents_is_built():
    assert [doc for doc in DOCS if not (HTML / f"{doc}.html").exists()] == []


def test_only_the_pages_of_the_table_of_contents_are_built():
    own = {f"{doc}.html" for doc in DOCS} | {"index.html", "search.html", "genindex.html", "py-modindex.html"}
    assert [page for page in pages() if page not in own and not page.startswith("_modules/")] == []


@pytest.mark.parametrize("old", REDIRECTS)
def test_old_addresses_lead_to_the_new_pages(old):
    target = (HTML / f"{old}.html").parent / REDIRECTS[old]
    assert target.is_file() and f"{old}.html" not in pages()
    assert REDIRECTS[old] in (HTML / f"{old}.html").read_text("utf-8")


def test_no_dead_links():
    dead = []
    for page in pages():
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src"), ("source", "src")):
            for element in soup(page).find_all(tag, attrs={attribute: True}):
                url = urlsplit(element[attribute])
                if url.scheme or url.netloc:
                    continue
                target = unquote(urlsplit(urljoin(f"http://book/{page}", element[attribute])).path).lstrip("/") or page
                if not (HTML / target).is_file():
                    dead.append(f"{page}: {element[attribute]}: no such file")
                elif tag == "a" and url.fragment and target.endswith(".html") and unquote(url.fragment) not in anchors(target):
                    dead.append(f"{page}: {element[attribute]}: no such anchor")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere():
    remote = re.compile(r"^(https?:)?//")
    found = [f"{page}: {element}" for page in pages() for tag, attribute in (("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"))
             for element in soup(page).find_all(tag, attrs={attribute: remote}) if element.get("rel") != ["canonical"]]
    assert found == []


def test_no_nbdev_directives_are_shown():
    assert [page for page in pages() if DIRECTIVE.search(soup(page).get_text())] == []
    assert not DIRECTIVE.search((HTML / "searchindex.js").read_text("utf-8"))


def test_every_image_has_a_text():
    assert [f"{page}: {image['src']}" for page in pages() for image in soup(page).find_all("img") if not image.get("alt", "").strip()] == []


def test_figures_say_what_they_show():
    dull = [f"{page}: {image['src']}" for page in pages() for image in soup(page).select("div.cell_output img")
            if re.search(r"_images/|\.png$", image["alt"])]
    assert dull == [], "the cell's metadata wants mystnb: {image: {alt: ...}}"


@pytest.mark.parametrize("doc", CHAPTERS)
def test_chapters_open_in_colab(doc):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    repository = settings["DEFAULT"]["git_url"].removeprefix("https://github.com/")
    wanted = f"https://colab.research.google.com/github/{repository}/blob/{settings['DEFAULT']['branch']}/{doc}.ipynb"
    assert {link["href"] for link in soup(f"{doc}.html").select('a[href^="https://colab."]')} == {wanted}
    assert (ROOT / f"{doc}.ipynb").exists()


@pytest.mark.parametrize("doc", CHAPTERS)
def test_exported_cells_name_their_module(doc):
    code = [cell for cell in cells(doc) if cell["cell_type"] == "code"]
    module = next((found[1] for cell in code if (found := re.search(r"#\s*\|\s*default_exp\s+(\w+)", cell["source"]))), None)
    exported = [cell for cell in code if re.search(r"^#\s*\|\s*export[is]?\b", cell["source"], re.M) and not re.search(r"^#\s*\|\s*hide\b", cell["source"], re.M)
                and not {"remove-cell", "remove-input"} & set(cell["metadata"].get("tags", []))]
    boxes = soup(f"{doc}.html").select("div.cell_input.exported")
    assert len(boxes) == len(exported)
    for box in boxes:
        assert f"Exported to → llama_nb/{module}.py" == " ".join(box.select_one(".export-label").get_text().split())
        assert box.select_one(".export-label a")["href"] == f"../book/api.html#module-llama_nb.{module}"


def test_each_solution_is_folded():
    for doc in CHAPTERS:
        solutions = [cell for cell in cells(doc) if "hide-cell" in cell["metadata"].get("tags", []) and "mystnb" not in cell["metadata"]]
        folds = [fold for fold in soup(f"{doc}.html").select("details.hide") if "Show the solution" in fold.summary.get_text()]
        assert len(folds) == len(solutions) and not any(fold.has_attr("open") for fold in folds), doc


def test_the_diagram_links_to_every_part():
    diagram = soup("book/intro.html").find("svg", class_="llama-diagram")
    assert diagram.title.get_text(strip=True) and diagram.desc.get_text(strip=True)
    assert all(link.title.get_text(strip=True) for link in diagram.find_all("a"))
    linked = {link["href"].split("/")[-1].removesuffix(".html") for link in diagram.find_all("a")}
    assert linked == {"01_checkpoint", "02_tokenizer", "03_embedding", "04_block", "05_attention", "06_rope", "07_model", "08_sampling", "09_generation"}


def test_the_api_reference_names_every_export():
    from importlib import import_module
    for module in sorted((ROOT / "llama_nb").glob("[a-z]*.py")):
        name = f"llama_nb.{module.stem}"
        loaded = import_module(name)
        exports = [entry for entry in getattr(loaded, "__all__", []) if callable(getattr(loaded, entry))]
        missing = [entry for entry in exports if f"{name}.{entry}" not in anchors("book/api.html")]
        assert missing == [], name


def test_the_api_reference_shows_no_inherited_text():
    assert "This method must be implemented" not in soup("book/api.html").get_text()
    assert not [tag["id"] for tag in soup("book/api.html").select("dt[id]") if tag["id"].endswith((".add_weight", ".count_params"))]


# Pages in a browser

@pytest.fixture(scope="module")
def site():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: page.problems.append(f"script: {error}"))
    page.on("requestfailed", lambda request: page.problems.append(f"failed: {request.url}"))
    page.on("request", lambda request: urlsplit(request.url).hostname not in ("127.0.0.1", None) and page.problems.append(f"elsewhere: {request.url}"))
    yield page
    context.close()


def settled(page):
    page.evaluate("async () => { await document.fonts.ready; if (window.MathJax?.startup?.promise) await MathJax.startup.promise }")


WIDE = """() => [...document.querySelectorAll('.bd-article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('mjx-container')
  && ![...function*() { for (let p = e.parentElement; p; p = p.parentElement) yield p }()].some(p => ['auto', 'scroll'].includes(getComputedStyle(p).overflowX)))
  .slice(0, 3).map(e => e.tagName + '.' + e.className)"""
CONTRAST = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4).reduce((s, c, i) => s + c * [.2126, .7152, .0722][i], 0)
  const colour = text => text.match(/[\\d.]+/g).map(Number)
  const behind = e => { for (; e; e = e.parentElement) { const c = colour(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .99) return c.slice(0, 3) } return [255, 255, 255] }
  return [...document.querySelectorAll('.bd-article p, .bd-article li, .bd-article a, .bd-article figcaption, .bd-article pre span, .bd-article td')].filter(e => e.checkVisibility() && e.innerText?.trim() && !e.closest('svg') && !e.closest('.btn, .sd-btn, .headerlink'))
    .map(e => { const [a, b] = [luminance(colour(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.tagName + '.' + e.className + ': ' + e.innerText.slice(0, 30)] })
    .filter(([ratio]) => ratio < 4.5).slice(0, 3).map(([ratio, what]) => what + ' ' + ratio.toFixed(2))
}"""


BEHIND_FIGURES = "() => [...new Set([...document.querySelectorAll('div.cell_output img')].map(e => getComputedStyle(e).backgroundColor))]"


@pytest.mark.parametrize("doc", DOCS)
def test_page_reads_well(doc, page, site):
    page.goto(f"{site}/{doc}.html")
    settled(page)
    assert page.locator("mjx-container svg").count() >= len(soup(f"{doc}.html").select("span.math, div.math")), "formulas that are not typeset"
    assert page.locator("mjx-container [data-mml-node=merror], mjx-container [fill=red]").count() == 0, "a formula has an error"
    for width in (390, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(60)
        wide = page.evaluate("() => document.documentElement.scrollWidth") > width
        assert not wide, f"{width} px: the page scrolls sideways: {page.evaluate(WIDE)}"
    for mode in ("light", "dark"):
        page.evaluate("mode => { document.documentElement.dataset.mode = document.documentElement.dataset.theme = mode }", mode)
        page.wait_for_timeout(350)
        assert page.evaluate(CONTRAST) == [], f"{mode}: too little contrast"
        assert page.evaluate(BEHIND_FIGURES) in ([], ["rgb(255, 255, 255)"])
    assert page.problems == []


def test_pages_open_as_files(page):
    for doc in (TOC["root"], "nbs/06_rope", "book/notation"):
        page.goto((HTML / f"{doc}.html").as_uri())
        settled(page)
        assert page.locator("mjx-container svg").count() >= len(soup(f"{doc}.html").select("span.math, div.math"))
    assert page.problems == []


def test_search_finds_a_chapter(page, site):
    page.goto(f"{site}/search.html?q=rotary")
    page.wait_for_selector("#search-results ul.search li a")
    assert page.locator("#search-results ul.search li a").count() >= 1
    assert page.problems == []


def test_the_diagram_works_with_the_keyboard(page, site):
    page.goto(f"{site}/book/intro.html")
    link = page.locator("svg.llama-diagram a", has_text="RoPE")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/nbs/06_rope.html")
