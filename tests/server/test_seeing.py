"""Images and videos over HTTP: every form of the clients that send them, what is refused, and where it says so."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jaxrank import Reranker
from jaxrank.media.images import Limits
from jaxrank.server.dialects.resolve import DIALECTS
from jaxrank.server.media.fetch import MediaAccess
from tests.checkpoints import make_qwen3_vl
from tests.media import clip, encoded, photo
from tests.server.fakes import rerank, serving

FILES = {f"/{i}.png": encoded(photo(96, 64, i)) for i in range(9)}
FILES |= {"/clip.mp4": clip(), "/page.jpg": b"<html>not an image</html>"}


class Site(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # pyright: ignore[reportAttributeAccessIssue]
        body = FILES.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def web(site: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{site.server_port}"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = make_qwen3_vl(tmp_path_factory.mktemp("vl"))
    made = Reranker.from_pretrained(folder, dtype="float32", row_tokens=192, max_length=512, compile_cache=None)
    assert made.tower is not None
    made.tower.ladder, made.tower.row_patches = (1024, 4096), 1024  # fewer programs to compile
    return made


@pytest.fixture(scope="module")
def url(reranker: Reranker) -> Iterator[str]:
    access = MediaAccess(private=True, max_items=12)
    with serving(reranker, patience_s=300, media=access, limits=Limits(max_pixels=100_000)) as base:
        yield base


def image_part(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def scores(answer: httpx.Response) -> np.ndarray:
    """In the order of the request."""
    assert answer.status_code == 200, answer.text
    results = answer.json()
    assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)
    return np.array([r["score"] for r in sorted(results, key=lambda r: r["index"])])


class TestForms:
    def test_those_of_the_seeds(self, url: str, web: str, reranker: Reranker) -> None:
        """Text query with image, mixed and video documents; a query with an image, and an instruct."""
        text = "A woman playing with her dog on a beach at sunset."
        documents: list[Any] = [
            text,
            [image_part(f"{web}/1.png")],
            [{"type": "text", "text": "A dog "}, image_part(f"{web}/2.png")],
            [{"type": "video_url", "video_url": {"url": f"{web}/clip.mp4"}}],
        ]
        ours: list[Any] = [
            text,
            {"image": FILES["/1.png"]},
            ["A dog ", {"image": FILES["/2.png"]}],
            {"video": FILES["/clip.mp4"]},
        ]
        body = {"query": "Find the dog.", "documents": documents, "return_documents": False}
        np.testing.assert_allclose(scores(rerank(url, body)), reranker.score("Find the dog.", ours), atol=1e-5)
        query = [{"type": "text", "text": "Like this: "}, image_part(f"{web}/0.png")]
        body |= {"query": query, "instruct": "Find images or descriptions similar to the query image."}
        want = reranker.score(["Like this: ", {"image": FILES["/0.png"]}], ours, instruct=str(body["instruct"]))
        np.testing.assert_allclose(scores(rerank(url, body)), want, atol=1e-5)
        assert np.ptp(want) > 0.01

    def test_other_clients(self, url: str, web: str) -> None:
        """One image in every form, and a video as a list of frames."""
        data = "data:image/png;base64," + base64.b64encode(FILES["/3.png"]).decode()
        forms: list[Any] = [
            [image_part(f"{web}/3.png")],
            image_part(data),
            {"image": f"{web}/3.png"},
            {"image": data},
            {"type": "image", "image": data},
            {"type": "image_url", "image_url": f"{web}/3.png"},
            {"content": [image_part(data)]},
            {"content": [{"type": "text", "text": ""}, {"image": data}]},
        ]
        got = scores(rerank(url + "/sglang", {"query": "q", "documents": forms}))
        np.testing.assert_allclose(got, np.full(len(forms), got[0]), atol=1e-5)
        frames = [f"{web}/{i}.png" for i in range(4)]
        assert scores(rerank(url, {"query": "q", "documents": [{"type": "video", "video": frames}]})).shape == (1,)

    def test_documents_come_back_as_sent_without_payloads(self, url: str, web: str) -> None:
        data = "data:image/png;base64," + base64.b64encode(FILES["/3.png"]).decode()
        documents = [[{"type": "text", "text": "a"}, image_part(data)], [image_part(f"{web}/3.png")], "text"]
        answer = rerank(url, {"query": "q", "documents": documents})
        assert answer.status_code == 200
        shown = {result["index"]: result["document"] for result in answer.json()}
        assert shown[0] == [{"type": "text", "text": "a"}, image_part("data:image/png;base64,...")]
        assert shown[1] == documents[1]
        assert shown[2] == "text"
        assert len(answer.content) < 1500


class TestCost:
    def test_each_image_is_fetched_and_looked_at_once(self, url: str, web: str, site: Any, reranker: Reranker) -> None:
        assert reranker.tower is not None
        before, site.asked[:] = reranker.tower.encoded, []
        documents = [[image_part(f"{web}/{i % 4 + 1}.png")] for i in range(8)]
        body = {"query": [image_part(f"{web}/0.png")], "documents": documents}
        got = scores(rerank(url, body))
        np.testing.assert_allclose(got[:4], got[4:], atol=1e-5)
        assert sorted(site.asked) == [f"/{i}.png" for i in range(5)]
        assert reranker.tower.encoded - before == 5

    def test_nothing_is_compiled_while_serving(self, url: str) -> None:
        assert httpx.get(url + "/ready").json()["compilations_after_ready"] == 0


class TestDialects:
    def test_tokens_of_media_are_counted_and_shown(self, url: str, web: str, reranker: Reranker) -> None:
        documents: list[Any] = ["text", [image_part(f"{web}/1.png")], {"video": f"{web}/clip.mp4"}]
        body = {
            "query": {"content": [{"type": "text", "text": "q"}, image_part(f"{web}/0.png")]},
            "documents": documents,
        }
        answer = httpx.post(url + "/v1/rerank", json=body, timeout=60).json()
        ours = ["text", {"image": FILES["/1.png"]}, {"video": FILES["/clip.mp4"]}]
        pairs = reranker.encode(["q", {"image": FILES["/0.png"]}], ours)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, pairs))
        shown = httpx.post(url + "/tokenize?render=true", json=body, timeout=60).json()
        assert shown["count"] == answer["usage"]["prompt_tokens"]
        pads = [(prompt.count("<|image_pad|>"), prompt.count("<|video_pad|>")) for prompt in shown["prompts"]]
        one = pads[0][0]
        assert one > 0
        assert pads[1][0] > one
        assert pads[2][1] > 0

    def test_pairs_of_media(self, url: str, web: str) -> None:
        """Each query with its own document, media fetched once a request."""
        sides: list[Any] = [{"image": f"{web}/1.png"}, "text", {"image": f"{web}/2.png"}]
        answer = httpx.post(url + "/score", json={"data_1": sides, "data_2": sides[::-1]}, timeout=60).json()
        got = [one["score"] for one in answer["data"]]
        for i in range(3):
            alone = httpx.post(
                url + "/rerank", json={"query": sides[i], "documents": [sides[2 - i]]}, timeout=60
            ).json()
            assert got[i] == pytest.approx(alone["results"][0]["relevance_score"], abs=1e-5)
        wrong = {"text_1": ["a", "b"], "text_2": ["a", {"image": f"{web}/page.jpg"}]}
        refused = httpx.post(url + "/score", json=wrong, timeout=60)
        assert refused.json()["message"].startswith("text_2[1][0] is not an image")

    def test_documents_and_refusals(self, url: str, web: str) -> None:
        documents = [
            {"text": "a", "id": 1},
            {"image": f"{web}/1.png", "id": 2},
            [{"text": "b"}, image_part(f"{web}/2.png")],
        ]
        answer = httpx.post(url + "/jina/v1/rerank", json={"query": "q", "documents": documents}, timeout=60).json()
        assert [r["document"] for r in sorted(answer["results"], key=lambda r: r["index"])] == [
            {"text": "a", "id": 1, "multi_modal": None},
            {"image": f"{web}/1.png", "id": 2, "text": None, "multi_modal": [documents[1]]},
            {"text": "b", "multi_modal": documents[2]},
        ]
        bad = {"query": "q", "documents": [{"image": f"{web}/page.jpg"}]}
        statuses = {name: httpx.post(f"{url}/{name}/rerank", json=bad, timeout=60).status_code for name in DIALECTS}
        assert statuses == {name: 400 if name in ("sglang", "llamacpp") else 422 for name in DIALECTS}


class TestRefused:
    @pytest.mark.parametrize(
        "document, status, message",
        [
            ([{"text": "a"}, {"image": "{web}/page.jpg"}], 400, "documents[1][1] is not an image of a kind that is"),
            ({"image": "{web}/missing.png"}, 400, "documents[1][0] is at an address from which it could not be"),
            ({"image": "file:///etc/passwd"}, 400, "documents[1][0] is a file name, and this server reads no files"),
            ({"image": "data:image/png;base64,AAAA"}, 400, "documents[1][0] is not an image of a kind"),
            ({"video": "{web}/1.png"}, 400, "documents[1][0] is not a video of a kind"),
            ([{"image": "{web}/1.png"}] * 13, 413, "documents[1][0] is one of more than 12 images and videos"),
            ({"type": "input_audio", "input_audio": {}}, 400, "this model takes texts, images and videos only"),
            ({"image": 7}, 400, "documents[1] must be a string, an object"),
            ({"image": "{web}/1.png", "video": "{web}/1.png"}, 400, "documents[1] must be a string, an object"),
        ],
    )
    def test_with_its_place(self, url: str, web: str, document: Any, status: int, message: str) -> None:
        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(one) for key, one in value.items()}
            if isinstance(value, list):
                return [filled(one) for one in value]
            return value.replace("{web}", web) if isinstance(value, str) else value

        answer = rerank(url, {"query": "q", "documents": ["fine", filled(document)]})
        assert (answer.status_code, message in answer.json()["message"]) == (status, True), answer.text

    def test_large_pictures(self, url: str) -> None:
        data = "data:image/png;base64," + base64.b64encode(encoded(photo(400, 300))).decode()
        answer = rerank(url, {"query": {"image": data}, "documents": ["d"]})
        assert answer.status_code == 400
        assert answer.json()["message"].startswith("query[0] is an image of more than 100,000 pixels")

    def test_private_addresses_by_default(self, reranker: Reranker, web: str, site: Any) -> None:
        site.asked[:] = []
        with serving(reranker, patience_s=60) as base:
            answer = rerank(base, {"query": "q", "documents": [{"image": f"{web}/1.png"}]})
        assert answer.status_code == 400
        assert "documents[0][0] is" in answer.json()["message"]
        assert site.asked == []


def test_files_of_a_folder(reranker: Reranker, tmp_path: Path) -> None:
    Image.open(io.BytesIO(FILES["/1.png"])).save(tmp_path / "one.png")
    with serving(reranker, patience_s=60, media=MediaAccess(folder=tmp_path)) as base:
        got = scores(rerank(base, {"query": "q", "documents": [{"image": f"file://{tmp_path}/one.png"}]}))
        outside = rerank(base, {"query": "q", "documents": [{"image": f"file://{tmp_path}/../other.png"}]})
    np.testing.assert_allclose(got, reranker.score("q", [{"image": FILES["/1.png"]}]), atol=1e-5)
    assert outside.status_code == 400
