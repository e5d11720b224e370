"""A replica and its arguments, without Ray around them."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from ray.serve.schema import ServeDeploySchema

from jaxrank import RequestError, Reranker
from jaxrank.server.on_ray import app as ray_app

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def test_its_application_answers() -> None:
    """Once its start has ended, which is when the model is warm."""
    undecorated = ray_app.Replica.__mro__[1]  # Ray's own is made by its cluster alone
    replica: Any = undecorated({"replicas": 2, "max_documents": 3, "dtype": "float32"})
    documents = ["hi", "The giant panda is a bear species endemic to China.", "Paris is in France."]
    with TestClient(replica.__serve_build_asgi_app__()) as client:
        answer = client.post("/v1/rerank", json={"query": "what is panda?", "documents": documents})
        refused = client.post("/v1/rerank", json={"query": "what is panda?", "documents": documents * 2})
        assert "jaxrank_ready 1.0" in client.get("/metrics").text
        asyncio.run(replica.check_health())
    want = Reranker.from_pretrained(dtype="float32").score("what is panda?", documents, raw=True)
    assert answer.json()[0]["document"] == documents[1]
    assert {one["index"]: one["score"] for one in answer.json()} == pytest.approx(dict(enumerate(want)), abs=1e-4)
    assert (answer.status_code, refused.status_code) == (200, 413)


@pytest.mark.parametrize("failed, failing", [(False, False), (True, False), (False, True)])
def test_health(failed: bool, failing: bool) -> None:
    """What Ray asks every few seconds."""
    service = SimpleNamespace(scheduler=SimpleNamespace(failed=failed, failing=failing))
    replica: Any = object.__new__(ray_app.Replica)
    replica._app = SimpleNamespace(state=SimpleNamespace(service=service))
    expected = pytest.raises(RuntimeError, match="scoring") if failed or failing else nullcontext()
    with expected:
        asyncio.run(replica.check_health())
    del replica._app


def test_configurations_in_deploy_are_taken() -> None:
    """Ray's own schema takes them, and our application their arguments."""
    alone = yaml.safe_load((DEPLOY / "ray.yaml").read_text())
    service = yaml.safe_load((DEPLOY / "kubernetes" / "ray.yaml").read_text())["spec"]
    for config in (alone, yaml.safe_load(service["serveConfigV2"])):
        (app,) = ServeDeploySchema.model_validate(config).applications
        assert app.import_path == "jaxrank.server.on_ray.app:build"
        assert ray_app.read(app.args).gpus == 1
    (worker,) = service["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["cpu"]) >= app.args["cpus"], "no replica fits a worker"


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(api_key="secret"), "api_key_file"),
        (dict(port=8000), "http_options"),
        (dict(no_such=1), "--no-such=1"),
        (dict(replicas=0), "must be a whole number of at least 1"),
        (dict(replicas=3, max_replicas=2), "fewer than the 3 replicas"),
        (dict(open_metrics="yes"), "must be true or false"),
        (dict(dialect="nobody"), "invalid choice: 'nobody'"),
    ],
)
def test_arguments_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ray_app.build(given)


def test_arguments_are_the_flags_of_the_command() -> None:
    asked = ray_app.read(
        {"model": "m", "max-documents": 7, "open_metrics": "true", "no_remote_media": False, "tpus": "4"}
    )
    assert (asked.model_flag, asked.max_documents, asked.open_metrics, asked.no_remote_media) == (["m"], 7, True, False)
    assert asked.tpus == 4
