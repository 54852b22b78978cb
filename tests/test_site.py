"""The site that .ci/site makes, in a browser: no page is too wide, and the search finds."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# In a browser this page writes the width that each page of the site takes in a frame.
FRAMES = """<!doctype html><body><script>
async function measure(name) {{
  const frame = document.createElement("iframe");
  frame.width = {width}; frame.height = 800; frame.src = name;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  return frame.contentDocument.documentElement.scrollWidth;
}}
(async () => {{
  const widths = {{}};
  for (const name of {names}) widths[name] = await measure(name);
  document.body.innerHTML = "<pre>" + JSON.stringify(widths) + "</pre>";
}})();
</script>"""

pytestmark = pytest.mark.skipif(
    not (SITE / "README.html").exists(), reason="needs the site that `bash .ci/site` builds"
)


@pytest.fixture
def site(tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(SITE, copy)
    return copy


@pytest.fixture
def shown(site, tmp_path):
    """Return what a browser makes of a page of the site."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def show(page):
            flags = "--headless --no-sandbox --disable-gpu --dump-dom --virtual-time-budget=60000"
            url = f"http://127.0.0.1:{server.server_port}/{page}"
            command = [program, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", url]
            return subprocess.check_output(command, text=True, timeout=300)

        yield show
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(shown, site, width):
    names = [str(x.relative_to(site)) for x in site.rglob("*.html") if "_modules" not in x.parts]
    (site / "frames.html").write_text(FRAMES.format(width=width, names=json.dumps(names)))
    widths = json.loads(re.search(r"<pre>(.*)</pre>", shown("frames.html"))[1])
    assert widths.keys() == set(names)
    assert {name: w for name, w in widths.items() if w > width} == {}


def test_the_search_finds_a_page(shown):
    page = shown("search.html?q=enqueue_mask")
    results = re.search(r'<ul[^>]*class="search".*?</ul>', page, flags=re.DOTALL)[0]
    assert 'href="docs/api.html"' in results
