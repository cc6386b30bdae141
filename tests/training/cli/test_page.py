"""The page of `svitt search --serve`: what it answers, and in a browser."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.training.cli import main, page
from svitt_ops.training.embeddings.embedding import Embedder, embed
from svitt_ops.training.embeddings.listing import list_media
from svitt_ops.training.embeddings.store import Embeddings, write
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "a red circle, then a blue square"
ENOUGH = 120  # seconds in which a browser shows anything, however busy the machine is


@pytest.fixture(scope="module")
def embedder(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("page") / "run"
    recipe = make_recipe(output, "optimizer.steps=2", eval_pattern_seed=0)
    return Embedder.load(pretrain(recipe).folder, cpu=True)


@pytest.fixture
def found(embedder: Embedder, corpus: Path, tmp_path: Path) -> Embeddings:
    """Of the test clips, in a folder whose name a page must not take for its own."""
    folder = tmp_path / "<b>clips"
    shutil.copytree(corpus / "videos", folder)
    some = [
        str(folder / Path(x["video"]).name) for x in json.loads((corpus / "test.json").read_text())
    ]
    return embed(
        embedder, list_media(some, "video"), "video", tmp_path / "e.safetensors"
    ).embeddings


def nothing(path: Path, embedder: Embedder) -> Embeddings:
    """An empty set."""
    stamps = torch.zeros(0, 2, dtype=torch.int64)
    rows = {"names": [], "stamps": stamps, "embeddings": torch.zeros(0, 8)}
    write(path, kind="video", identity=embedder.identity("video"), **rows)
    return Embeddings.load(path)


def test_answers(found: Embeddings, embedder: Embedder, tmp_path: Path) -> None:
    find = page.finder(found, embedder)
    text = find(QUERY, 3)
    assert text.startswith("<p>3 of 8</p>") and text.count("data:image/png;base64,") == 3
    assert "<b>" not in text and "&lt;b&gt;clips" in text
    Path(found.names[0]).unlink()
    text = find(QUERY, 8)
    assert text.count("<img") == 7 and "No such file" in text
    for query, line in (("  ", "query: must be a sentence"), ("x.mp4", "which is not there")):
        with pytest.raises(ValueError, match=line):
            find(query, 3)
    with pytest.raises(ValueError, match="has no clips"):
        page.finder(nothing(tmp_path / "none", embedder), embedder)(QUERY, 3)


def test_refusals(found: Embeddings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", str(found.path), "--model", str(tmp_path)]
    for more in ([], ["a", "--serve"]):
        assert main([*words, *more]) == 2
        assert "query: must be given, or --serve" in capsys.readouterr().err


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    pytest.importorskip("gradio")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("neither chromium nor chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def until(what: Callable[[], Any]) -> Any:
    """What is found, once it is there."""
    end = time.monotonic() + ENOUGH
    while True:
        try:
            if result := what():
                return result
        except Exception:  # of a page that is not whole
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "the page does not show it"
        time.sleep(0.1)


def requested(browser: Any) -> list[str]:
    """The addresses that the page has asked for."""
    messages = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    sent = [x for x in messages if x["method"] == "Network.requestWillBeSent"]
    return [x["params"]["request"]["url"] for x in sent]


def test_in_a_browser(found: Embeddings, embedder: Embedder, tmp_path: Path, browser: Any) -> None:
    def select(which: str) -> Any:
        return browser.find_element("css selector", which)

    def ask(text: str) -> None:
        box = until(lambda: select("#query textarea, #query input"))
        box.clear()
        box.send_keys(text)
        select("#submit").click()

    shown = page.build_page(found, embedder, 3)
    address = page.serve(shown, wait=False)
    try:
        assert address.startswith("http://127.0.0.1:")
        browser.get(address)
        ask(QUERY)
        until(lambda: "3 of 8" in select("#found").text)
        pictures = browser.find_elements("css selector", "#found img")
        assert len(pictures) == 3
        assert all(until(lambda x=x: x.get_property("naturalWidth")) > 400 for x in pictures)
        ask("x.mp4")
        until(lambda: "which is not there" in select("#found").text)
        asked = requested(browser)
        assert asked and all(x.startswith((address, "data:", "blob:")) for x in asked), asked
        assert shown.server_name == "127.0.0.1" and shown.share_url is None
    finally:
        shown.close()
    empty = page.build_page(nothing(tmp_path / "none", embedder), embedder)
    address = page.serve(empty, wait=False)
    try:
        browser.get(address)
        ask(QUERY)
        until(lambda: "has no clips" in select("#found").text)
    finally:
        empty.close()
