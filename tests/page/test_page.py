"""The page at / in a real browser, headless: what people see and do, with the mouse and without."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.remote.webelement import WebElement

from jaxrank.media.images import Preprocessing
from jaxrank.media.patches import image_patches
from jaxrank.reranker import Reranker
from tests.media import encoded, photo
from tests.server.fakes import FakeReranker, serving, until

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser is installed: neither chromium, chromium-browser nor google-chrome"
)

QUERY = "what is panda?"
PANDA = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear species "
    "endemic to China."
)
NASTY = """<img src=x onerror="document.title='hacked'"> it's $HOME `id` $(id) \\ \\\\ "quoted" \u2028\n\tJSON\nπ 🐼"""


class Page:
    """The browser with the page in it, and what tests ask of it."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, base: str) -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(base + "/")
        until(lambda: self.text("#state") not in ("asking …", ""))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def ctrl_enter(self) -> None:
        chain = ActionChains(self.driver, duration=0)
        chain.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()

    def fill(self, query: str, *documents: str) -> None:
        self.one("#query").send_keys(query)
        for _ in range(len(documents) - len(self.all("#documents textarea"))):
            self.one("#add").click()
        for box, document in zip(self.all("#documents textarea"), documents, strict=False):
            # what is typed is no matter of the page, and a browser's driver cannot type all of Unicode
            self.driver.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                box, document,
            )  # fmt: skip

    def transfer(self, target: WebElement, event: str, **content: Any) -> None:
        """Paste or drop text, or files as {name, type, bytes in base64}, on an element."""
        self.driver.execute_script(
            """const [target, event, {text, files}] = arguments, data = new DataTransfer();
            if (text) data.setData("text/plain", text);
            for (const {name, type, base64} of files ?? [])
              data.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], name, {type}));
            const shared = {bubbles: true, cancelable: true};
            target.dispatchEvent(event === "paste" ? new ClipboardEvent(event, {...shared, clipboardData: data})
                                                   : new DragEvent(event, {...shared, dataTransfer: data}));""",
            target, event, content,
        )  # fmt: skip

    def rank(self) -> None:
        self.one("#rank").click()
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        until(lambda: self.text("#rank") == "Rank" and (self.text("#summary") or self.text("#error")))

    def ranking(self) -> list[tuple[str, str, str]]:
        """Score, text and document of each place."""
        script = """return [...document.querySelectorAll("#ranking > li")].map((item) =>
            [".score", ".text", "button"].map((part) => item.querySelector(part).innerText))"""
        rows: list[list[str]] = self.driver.execute_script(script)
        return [(score.split()[-1], text, document) for score, text, document in rows]

    def bars(self) -> list[tuple[float, float]]:
        """Where each bar begins and ends, in parts of its track."""
        script = """return [...document.querySelectorAll("#ranking .track")].map((track) => {
            const all = track.getBoundingClientRect(), bar = track.querySelector(".bar").getBoundingClientRect();
            return [(bar.left - all.left) / all.width, (bar.right - all.left) / all.width]; })"""
        return [(left, right) for left, right in self.driver.execute_script(script)]

    def focused(self) -> tuple[str, str]:
        """Role and name of the element with the focus, as a screen reader tells them."""
        element = self.driver.switch_to.active_element
        return element.aria_role, element.accessible_name

    def tab_to(self, name: str) -> str:
        """Press Tab until an element of that name has the focus; its role."""
        for _ in range(40):
            self.keys(Keys.TAB)
            role, found = self.focused()
            if found == name:
                return role
        raise AssertionError(f"Tab does not lead to {name!r}")

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def code(self, name: str) -> str:
        """The program that can be copied: "curl" or "python"."""
        return str(self.one(f"#{name}").get_property("textContent"))

    def run(self, name: str, folder: Path, **environment: str) -> str:
        """What that program prints."""
        command = ["sh", "-c", self.code(name)] if name == "curl" else [sys.executable, "-c", self.code(name)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def complaints(self) -> list[str]:
        """What the console says of the page, but for refused and failed requests, which tests provoke."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if "Failed to load resource" not in message]

    def requests(self) -> list[dict[str, Any]]:
        """The requests that the page has sent since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    options = ChromeOptions()
    assert BROWSER is not None
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: Chrome) -> Iterator[Page]:
    page = Page(driver)
    page.scheme("light")
    yield page
    assert page.complaints() == []


@pytest.fixture(scope="module")
def reranker() -> Reranker:
    return Reranker.from_pretrained(dtype="float32", max_length=128, row_tokens=128, compile_cache=None)


@pytest.fixture(scope="module")
def url(reranker: Reranker) -> Iterator[str]:
    with serving(reranker, patience_s=60) as base:
        yield base


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with serving(FakeReranker(), max_documents=5) as base:
        yield base


class TestRanking:
    def test_pandas(self, page: Page, url: str, reranker: Reranker) -> None:
        page.open(url)
        assert page.text("#state") == "ready"
        facts = page.text("#facts")
        assert reranker.name in facts
        assert "128 tokens" in facts
        assert "logits" in facts
        page.fill(QUERY, "hi", PANDA)
        page.rank()
        assert page.text("#error") == ""
        hi, panda = map(float, reranker.score(QUERY, ["hi", PANDA], raw=True))
        shown = page.ranking()
        assert [(text, document) for _, text, document in shown] == [(PANDA, "Document 2"), ("hi", "Document 1")]
        scores = [float(score.replace("−", "-")) for score, _, _ in shown]
        np.testing.assert_allclose(scores, [panda, hi], atol=0.006)
        tokens = sum(len(pair) for pair in reranker.encode(QUERY, ["hi", PANDA]))
        pattern = rf"2 documents ranked in [\d,]+ ms, {tokens} tokens\. Best: document 2, score .*"
        assert re.fullmatch(pattern, page.text("#summary"))

    def test_asks_nobody_else(self, page: Page, url: str) -> None:
        page.open(url)
        page.fill(QUERY, "hi")
        page.rank()
        sent = page.requests()
        assert {request["url"].removeprefix(url) for request in sent if not request["url"].startswith("data:")} == {
            "/", "/ready", "/v1/models", "/v1/rerank",
        }  # fmt: skip
        (asked,) = [request for request in sent if request["url"].endswith("rerank")]
        assert (asked["method"], asked["headers"]["X-Rerank-Dialect"]) == ("POST", "sglang")
        policy = httpx.get(url + "/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy

    def test_a_hundred_documents(self, page: Page, url: str, reranker: Reranker) -> None:
        documents = [f"Panda {i} eats {'bamboo ' * (i % 7)}in China." for i in range(100)]
        page.open(url)
        page.fill(QUERY)
        first = page.one("#documents textarea")
        page.transfer(first, "paste", text="\r\n".join(documents))
        assert page.text("#count").startswith("101 documents of at most")
        assert page.text("#notice") == "100 lines pasted as 100 documents."
        page.rank()
        scores = reranker.score(QUERY, documents, raw=True)
        shown = page.ranking()
        assert sorted(text for _, text, _ in shown) == sorted(documents)
        got = {document: float(score.replace("−", "-")) for score, _, document in shown}
        np.testing.assert_allclose([got[f"Document {i + 1}"] for i in range(100)], scores, atol=0.006)
        assert list(got.values()) == sorted(got.values(), reverse=True)
        page.one("#undo").click()
        assert [box.get_property("value") for box in page.all("#documents textarea")] == ["\n".join(documents), ""]

    @pytest.mark.parametrize(
        "documents, bars",
        [
            (["3 a", "-1 b", "0 c"], [(0.25, 1), (0.25, 0.25), (0, 0.25)]),
            (["-4 a", "-2 b"], [(0.5, 1), (0, 1)]),
            (["2 a", "8 b"], [(0, 1), (0, 0.25)]),
            (["0 a"], [(0, 0)]),
        ],
    )
    def test_bars_of_logits_begin_at_zero(
        self, page: Page, fake: str, documents: list[str], bars: list[tuple[float, float]]
    ) -> None:
        page.open(fake)
        page.fill("q", *documents)
        page.rank()
        np.testing.assert_allclose(page.bars(), bars, atol=0.01)
        assert "bars start at 0" in page.text("#scale")

    def test_probabilities_and_instruction(self, page: Page) -> None:
        fake = FakeReranker(logits=False)
        with serving(fake) as base:
            page.open(base)
            assert page.one("#instruct").accessible_name == "Instruction"
            page.one("#instruct").send_keys("Find fruit")
            page.fill("q", f"{np.log(1 / 3)} a", "-9 b", "20 c")
            page.rank()
            np.testing.assert_allclose(page.bars(), [(0, 1), (0, 0.25), (0, 0)], atol=0.01)
            assert [score for score, _, _ in page.ranking()] == ["1.000", "0.250", "<0.001"]
            assert not page.one("#scale").is_displayed()
        assert fake.instructs[-1] == "Find fruit"

    def test_no_instruction_where_the_model_takes_none(self, page: Page, fake: str) -> None:
        page.open(fake)
        until(lambda: "fake/reranker" in page.text("#facts"))
        assert not page.one("#instruct").is_displayed()
        assert not any(button.is_displayed() for button in page.all(".attach"))

    def test_text_is_never_markup(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", NASTY)
        page.rank()
        ((_, text, _),) = page.ranking()
        assert '<img src=x onerror="document.title=' in text
        assert page.all("img") == []
        assert "hacked" not in page.driver.title

    def test_documents_are_added_and_removed(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", "1 a", "2 b", "3 c")
        page.all("#documents .remove")[1].click()
        assert page.text("#notice") == "Document 2 removed."
        assert [box.get_property("value") for box in page.all("#documents textarea")] == ["1 a", "3 c"]
        page.rank()
        assert [document for _, _, document in page.ranking()] == ["Document 2", "Document 1"]
        page.one("#clear").click()
        assert [box.get_property("value") for box in page.all("#documents textarea")] == [""]
        assert page.focused() == ("textbox", "Document 1")


class Seeing(FakeReranker):
    """Notes what it is asked for; media count as one token each."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = Preprocessing()
        self.asked: list[tuple[Any, list[Any]]] = []

    def encode(self, query: Any, documents: Any, **options: Any) -> Any:
        self.asked.append((query, list(documents)))

        def plain(side: Any) -> str:
            return side if isinstance(side, str) else "".join(p if isinstance(p, str) else "x" for p in side)

        return super().encode(plain(query), [plain(one) for one in documents], **options)


@pytest.fixture(scope="module")
def seeing() -> Seeing:
    return Seeing()


@pytest.fixture(scope="module")
def sighted(seeing: Seeing) -> Iterator[str]:
    with serving(seeing, media_workers=1) as base:
        yield base


PICTURE = encoded(photo(64, 96))


def file(name: str, kind: str = "image/png", content: bytes = PICTURE) -> dict[str, str]:
    return {"name": name, "type": kind, "base64": base64.b64encode(content).decode()}


class TestImages:
    def open(self, page: Page, base: str) -> None:
        page.open(base)
        until(lambda: "image" in page.text("#facts"))

    def test_pasted_and_dropped(self, page: Page, sighted: str, seeing: Seeing, tmp_path: Path) -> None:
        self.open(page, sighted)
        page.fill("q", "a document")
        page.transfer(page.one("#query"), "paste", files=[file("query.png")])
        page.transfer(page.all("#documents textarea")[1], "drop", files=[file("it's $1.png")])
        until(lambda: len(page.all(".pictures img")) == 2)
        assert {image.accessible_name for image in page.all(".pictures img")} == {"query.png", "it's $1.png"}
        page.rank()
        assert page.text("#error") == ""
        assert {text for _, text, _ in page.ranking()} == {"a document", "[it's $1.png]"}
        query, documents = seeing.asked[-1]
        expected = image_patches(PICTURE).pixels
        np.testing.assert_array_equal(query[0].pixels, expected)
        assert query[1:] == ["q"]
        assert documents[0] == "a document"
        np.testing.assert_array_equal(documents[1][0].pixels, expected)
        for name in ("query.png", "it's $1.png"):
            (tmp_path / name).write_bytes(PICTURE)
        until(lambda: "$1.png" in page.code("curl"))
        seeing.asked.clear()
        for program in ("curl", "python") if shutil.which("curl") else ("python",):
            page.run(program, tmp_path)
            ((again, documents),) = seeing.asked
            seeing.asked.clear()
            np.testing.assert_array_equal(again[0].pixels, expected)
            np.testing.assert_array_equal(documents[1][0].pixels, expected)

    def test_removed(self, page: Page, sighted: str) -> None:
        self.open(page, sighted)
        page.transfer(page.one("#query"), "drop", files=[file("a.png"), file("b.txt", "text/plain")])
        until(lambda: "b.txt is no image of a kind that is taken" in page.text("#notice"))
        page.one(".pictures button").click()
        assert page.all(".pictures img") == []
        assert page.focused() == ("textbox", "Query")

    def test_damaged(self, page: Page, sighted: str) -> None:
        self.open(page, sighted)
        page.fill("q", "a")
        page.transfer(page.one("#query"), "paste", files=[file("a.png", content=PICTURE[:200])])
        until(lambda: page.all(".pictures img"))
        page.rank()
        assert "(400" in page.text("#error")

    def test_models_of_text_take_none(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.transfer(page.one("#query"), "drop", files=[file("a.png")])
        assert page.text("#notice") == "This model reads text alone, no images."
        assert page.all(".pictures img") == []


class TestErrors:
    def error(self, page: Page) -> str:
        assert page.one("#error").aria_role == "alert"
        assert page.ranking() == []
        return page.text("#error")

    def test_dead_server(self, page: Page) -> None:
        with serving(FakeReranker()) as base:
            page.open(base)
            page.fill("q", "1 a")
            page.rank()
            assert len(page.ranking()) == 1
        page.rank()
        assert self.error(page).startswith("The server does not answer")
        assert page.text("#state") == "not answering"
        assert page.one("#query").get_property("value") == "q"

    def test_key(self, page: Page) -> None:
        with serving(FakeReranker(), api_keys=["hunter2"]) as base:
            page.open(base)
            until(lambda: page.text("#error"))
            assert self.error(page).startswith("An API key is needed (401")
            assert page.focused()[1] == "API key"
            page.keys("hunter3", Keys.TAB)
            page.fill("q", "1 a")
            page.rank()
            assert self.error(page).startswith("An API key is needed (401")
            page.one("#key").clear()
            page.one("#key").send_keys("hunter2", Keys.TAB)
            until(lambda: "fake/reranker" in page.text("#facts"))
            page.rank()
            assert page.text("#error") == ""
            assert len(page.ranking()) == 1
            for program in ("curl", "python"):
                assert "API_KEY" in page.code(program)
                assert "hunter2" not in page.code(program)

    def test_too_many_documents(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", *"abcdef")
        page.rank()
        message = self.error(page)
        assert message.startswith("The request is too large (413")
        assert "5" in message

    def test_too_long(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", "1 " + "long " * 200)
        page.rank()
        assert "cut" in page.text("#ranking")
        page.one("#whole").click()
        page.rank()
        assert "This model's maximum context length is 500 tokens" in self.error(page)

    def test_not_ready(self, page: Page) -> None:
        def warm_up(progress: Callable[[str], None]) -> None:
            progress("2 of 9 programs")
            until(lambda: done, 30)

        done: list[bool] = []
        with serving(FakeReranker(warm_up=warm_up), wait=False) as base:
            try:
                page.open(base)
                until(lambda: page.text("#state") == "warming up: 2 of 9 programs")
                page.fill("q", "1 a")
                page.rank()
                message = self.error(page)
                assert message.startswith("The server cannot score now (503")
                assert "Try again in 5 seconds." in message
            finally:
                done.append(True)
            until(lambda: page.text("#state") == "ready")

    def test_nothing_to_rank(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.rank()
        assert self.error(page).startswith("There is no query")
        assert page.focused() == ("textbox", "Query")
        page.keys("q")
        page.rank()
        assert self.error(page).startswith("There are no documents")
        assert page.focused() == ("textbox", "Document 1")


class TestPrograms:
    """What can be copied asks for what the page asked for."""

    @pytest.mark.parametrize("name", ["curl", "python"])
    def test_any_text(self, page: Page, tmp_path: Path, name: str) -> None:
        if name == "curl" and not shutil.which("curl"):
            pytest.skip("curl is not installed")
        with serving(FakeReranker(), api_keys=["hunter2"]) as base:
            page.open(base)
            page.one("#key").send_keys("hunter2")
            page.fill("it's $q", "3 pears", NASTY)
            until(lambda: "3 pears" in page.code(name) and "API_KEY" in page.code(name))
            out = page.run(name, tmp_path, API_KEY="hunter2")
            length = float(len(NASTY))
            if name == "curl":
                assert [(one["index"], one["score"]) for one in json.loads(out)] == [(1, length), (0, 3.0)]
            else:
                assert out.splitlines() == [f"1 {length}", "0 3.0"]

    def test_copy(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", "1 a")
        page.one("#as-curl summary").click()
        page.driver.execute_script(  # what is typed right before the click is copied too
            """const box = document.querySelector("#documents textarea");
            document.querySelector("[data-copy=curl]").addEventListener("click", () => {
              box.value = "2 b";
              box.dispatchEvent(new Event("input", {bubbles: true}));
            }, {capture: true, once: true});"""
        )
        page.one("[data-copy=curl]").click()
        until(lambda: page.text("[data-copy=curl]") == "Copied")

        def pasted() -> str:
            page.one("#query").clear()
            page.one("#query").send_keys(Keys.CONTROL, "v")
            return str(page.one("#query").get_property("value"))

        until(lambda: pasted().startswith("curl 'http://127.0.0.1:"))  # the clipboard may be a moment late
        assert '"2 b"' in pasted()


class TestAddress:
    def test_none_under_a_dialect(self, fake: str) -> None:
        """The answers there are not of the form that the page reads."""
        for path in ("/cohere/", "/sglang/"):
            answer = httpx.get(fake + path)
            assert answer.status_code == 404
            assert "Open / instead" in answer.text
        assert httpx.get(fake + "/", headers={"X-Rerank-Dialect": "cohere"}).status_code == 200

    def test_the_servers_dialect_is_no_matter(self, page: Page) -> None:
        with serving(FakeReranker(), dialect="cohere") as base:
            page.open(base)
            page.fill("q", "1 a")
            page.rank()
            assert [text for _, text, _ in page.ranking()] == ["1 a"]


class TestKeyboard:
    def test_everything_without_a_mouse(self, page: Page, fake: str) -> None:
        page.open(fake)
        assert page.tab_to("Query") == "textbox"
        page.keys("fruit")
        assert page.tab_to("Document 1") == "textbox"
        page.keys("1 apple")
        assert page.tab_to("Document 2") == "textbox"
        page.keys("3 pears")
        assert page.tab_to("Add a document") == "button"
        page.keys(Keys.ENTER)
        assert page.focused() == ("textbox", "Document 3")
        page.keys("2 figs")
        page.ctrl_enter()
        page.wait_for_answer()
        assert [text for _, text, _ in page.ranking()] == ["3 pears", "2 figs", "1 apple"]
        assert page.tab_to("Remove document 3") == "button"
        page.keys(Keys.ENTER)
        assert page.focused() == ("textbox", "Document 2")
        assert page.tab_to("Rank") == "button"
        page.keys(Keys.SPACE)
        until(lambda: len(page.ranking()) == 2)
        assert page.tab_to("Document 2") == "button"
        page.keys(Keys.ENTER)
        assert page.focused() == ("textbox", "Document 2")

    def test_everything_has_a_name_and_a_visible_focus(self, page: Page, fake: str) -> None:
        page.open(fake)
        page.fill("q", *(f"{i} " + "a long document " * 20 for i in range(5)))
        page.rank()
        seen: set[str] = set()
        for _ in range(40):
            page.keys(Keys.TAB)
            element = page.driver.switch_to.active_element
            if element.tag_name == "body":  # the browser's own buttons come next, then the page again
                continue
            assert element.accessible_name, element.get_property("outerHTML")
            assert element.value_of_css_property("outline-style") == "solid", element.accessible_name
            on_top = page.driver.execute_script(
                """const {left, top, width, height} = arguments[0].getBoundingClientRect();
                return arguments[0].contains(document.elementFromPoint(left + width / 2, top + height / 2));""",
                element,
            )
            assert on_top, f"{element.accessible_name} is covered"
            seen.add(element.accessible_name)
        assert {"Query", "Document 1", "Remove document 5", "Add a document", "Rank", "curl", "Python"} <= seen


class TestLooks:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, page: Page, fake: str, scheme: str) -> None:
        """At least 4.5 to 1 for texts, as WCAG 2.2 asks (1.4.3), with a ranking and with an error."""
        page.scheme(scheme)
        page.open(fake)
        page.fill("q", "3 apples", "-2 pears")
        page.rank()
        colours = self.colours(page)
        page.one("#clear").click()
        page.one("#rank").click()
        assert page.text("#error")
        assert page.ranking() == []
        colours |= self.colours(page)
        assert len(colours) >= 5
        paper = luminance(page.one("body").value_of_css_property("background-color"))
        assert (paper > 0.8) if scheme == "light" else (paper < 0.05)
        for ink, behind in colours:
            light, dark = sorted((luminance(ink), luminance(behind)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, behind)

    def colours(self, page: Page) -> set[tuple[str, str]]:
        """Colours of all visible texts, and of what is behind them."""
        script = """const found = [];
            for (const element of document.querySelectorAll("body *")) {
              const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
              if (!element.checkVisibility() || !(texts.length || element.matches("textarea, input"))) continue;
              let behind = element;
              while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
              found.push([getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]);
            }
            return found;"""
        return {(ink, behind) for ink, behind in page.driver.execute_script(script)}

    def test_narrow_windows(self, page: Page, fake: str) -> None:
        page.driver.set_window_size(500, 900)
        try:
            page.open(fake)
            page.fill("q" * 300, "1 " + "x" * 300)
            page.rank()
            width, room = page.driver.execute_script(
                "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert width <= room
            top, height = page.driver.execute_script(
                "return [document.getElementById('ranking').getBoundingClientRect().top, innerHeight]"
            )
            assert 0 <= top < height, "the ranking is below the fold"
        finally:
            page.driver.set_window_size(1280, 1000)


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour, by WCAG 2.2's definition."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
