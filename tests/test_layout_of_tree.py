"""The architecture, held: who may import whom, and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxrank

ROOT = Path(__file__).parent.parent

LAYERS = [
    ["types", "errors", "version", "stages", "shards"],
    ["kernels", "prompts", "sharding", "media", "windows"],
    ["models", "tokens", "video", "patch_rows"],
    ["packing", "patches", "decoding_child"],
    ["attention"],
    ["scoring", "checkpoint", "decoding", "prompt_tokens"],
    ["convert", "tower", "contents", "research"],
    ["reranker"],
    ["server", "bench", "offline", "cross_encoder"],
    ["cli", "mteb"],
    ["parts", "server.ray_app"],
    ["ray_data"],
]
"""From the bottom up: a module imports only from the lines above its own (`from jaxrank.version` is free for all).

server.ray_app is a program like the command, whose flags it takes; nobody imports it.
"""


def modules():
    for folder, prefix in ((ROOT / "jaxrank", ""), (ROOT / "convert", "convert."), (ROOT / "server", "server.")):
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder).with_suffix("")
            if not prefix and inner.parts[0] in ("convert", "server"):
                continue
            yield path, (prefix + ".".join(inner.parts)).removesuffix(".__init__").removesuffix("__init__")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxrank":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("jaxrank."))


def test_imports_point_downwards():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    seen = 0
    for path, module in modules():
        top = module if module in level else module.split(".")[0]
        if top in ("", "__main__"):
            continue
        for target in imported(path):
            seen += 1
            assert target == top or level[target] < level[top], f"{path} imports jaxrank.{target}"
    assert seen > 40


def test_heavy_or_test_only_libraries_stay_out():
    for path, module in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                assert top != "torch" or module == "cross_encoder" or module.startswith("convert"), path
                web = ("fastapi", "starlette", "uvicorn", "h11", "httpcore2", "prometheus_client", "opentelemetry")
                assert top not in web or module.startswith("server"), path
                assert top != "av" or module in ("video", "decoding_child"), f"{path} imports av"
                assert top != "ray" or module in ("server.ray_app", "ray_data"), f"{path} imports ray"
                assert top != "pyarrow" or module == "parts", f"{path} imports pyarrow"
                assert top != "mteb" or module == "mteb", f"{path} imports mteb"
                assert top not in ("pytest", "sentence_transformers", "optax"), path


def test_what_decodes_untrusted_files_loads_little():
    code = (
        "import sys, jaxrank.decoding_child as _; print([m for m in ('jax', 'torch', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert set(jaxrank.__all__) == {
        "CheckpointError", "CrossEncoder", "JaxrankError", "ModelError", "Ranked", "RequestError", "Reranker",
        "TooLongError", "UnsupportedError", "__version__",
    }  # fmt: skip
    for name in jaxrank.__all__:
        assert getattr(jaxrank, name) is not None
