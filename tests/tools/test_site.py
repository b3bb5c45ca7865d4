"""The site: builds without a warning, documents all that is public, and a browser
shows it as it should be."""

import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mlx_adadelta

pytest.importorskip("sphinx", reason="Sphinx is not installed: it needs Python 3.11")

ROOT = Path(__file__).parents[2]
BROWSERS = (
    "chromium",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
NAMES = [
    x.stem for x in sorted((ROOT / "docs").iterdir()) if x.suffix in {".md", ".rst"}
]
# So many pictures and equations at least.
EXPECTED = {"index": (0, 5), "reference": (0, 2), "benchmarks": (1, 0)}
# In the browser, once the equations are set: what does not fit, and what is there.
LOOK = """async () => {
  await window.MathJax?.startup?.promise;
  const all = query => [...document.querySelectorAll(query)];
  const shown = x => x.getBoundingClientRect().width > 0;
  return {
    width: document.documentElement.scrollWidth,
    pictures: all("article img").length,
    missing: all("img").filter(x => !x.naturalWidth).map(x => x.src),
    formulas: all("article .math").length,
    equations: all("article mjx-container").filter(shown).length,
    mistakes: all("mjx-merror, mjx-container [style*='red']").length,
  };
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning"]
    done = subprocess.run(
        [*sphinx, "-d", out / "doctrees", "docs", out / "html"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_reference_has_all_that_is_public(site: Path) -> None:
    text = (site / "reference.html").read_text()
    names = set(mlx_adadelta.__all__) - {"__version__"}
    members = {x for x in vars(mlx_adadelta.AdaDelta) if not x.startswith("_")}
    for name in names | {f"AdaDelta.{x}" for x in members}:
        assert f'id="mlx_adadelta.{name}"' in text, name


def test_sidebar_leads_to_every_page(site: Path) -> None:
    text = (site / "search.html").read_text()
    for name in NAMES:
        assert f'href="{name}.html"' in text or name == "index", name


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("there is no Chromium or Chrome")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.mark.parametrize(
    "name, width", [(x, 390) for x in NAMES] + [(x, 1440) for x in EXPECTED]
)
def test_page_in_a_browser(browser: Any, address: str, name: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda x: problems.extend([x.url] if x.status >= 400 else []))
    page.goto(f"{address}/{name}.html")
    seen = page.evaluate(LOOK)
    page.close()

    pictures, equations = EXPECTED.get(name, (0, 0))
    assert problems == []
    assert [x for x in requests if not x.startswith(address)] == []
    assert seen["width"] <= width, "the page is wider than its window"
    assert seen["missing"] == [] and seen["pictures"] >= pictures
    assert seen["formulas"] == seen["equations"] >= equations
    assert seen["mistakes"] == 0


def test_search_in_a_browser(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=clip_scale")
    page.wait_for_selector("#search-results li a[href*='reference.html']")
    page.close()
