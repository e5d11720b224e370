"""The architecture, held: who may import whom, and the public names."""

import ast
import subprocess
import sys
from collections.abc import Container
from graphlib import TopologicalSorter
from pathlib import Path

import jaxrank

ROOT = Path(__file__).parent.parent

LAYERS = [
    ["errors", "stages", "types", "version"],
    ["kernels", "media.grid", "media.images", "runtime.calls", "runtime.compile_cache", "sharding", "text.prompts",
     "text.windows", "weights.shards"],
    ["media.video", "models", "text.tokenizer"],
    ["media.decoding_child", "media.patches", "runtime.packing", "runtime.patch_packing", "weights.converted"],
    ["convert", "media.decoding", "runtime.attention", "text.prompt_tokens"],
    ["research", "runtime.programs", "text.contents"],
    ["runtime.scorer", "runtime.vision_encoder"],
    ["reranker"],
    ["bench", "cross_encoder", "offline"],
    ["mteb"],
    ["server.api.schemas", "server.errors", "server.http.connections", "server.media.network", "server.observe.logs",
     "server.observe.tracing", "server.pipeline"],
    ["server.http.access", "server.http.json_input", "server.http.leash", "server.media.fetch", "server.scheduler"],
    ["server.media.loading", "server.observe.metrics"],
    ["server.api.content", "server.http.transport"],
    ["server.api.request", "server.http.gate"],
    ["server.api.tokenize", "server.dialects", "server.served_model"],
    ["server.api.openapi", "server.http.page", "server.settings"],
    ["server.api.facts", "server.inference"],
    ["server.service"],
    ["server.app"],
    ["server.serve"],
    ["server"],
    ["cli"],
    ["ray_data", "server.on_ray"],
]  # fmt: skip
"""From the bottom up: a module imports only from the lines above its own, or from its own entry.

server.on_ray and ray_data are programs like the command, whose flags they take; nobody imports them.
"""


def modules() -> dict[str, Path]:
    """The files of both packages, by what they are called behind `jaxrank.`; a package by its own name."""
    found = {}
    for folder, prefix in (("jaxrank", ()), ("convert", ("convert",)), ("server", ("server",))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if prefix or parts[0] not in ("convert", "server"):  # which are links
                found[".".join(part for part in (*prefix, *parts) if part != "__init__")] = path
    return found


def imported(path: Path, known: Container[str]) -> set[str]:
    """Which of the known modules a file imports, in functions and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxrank":
            module = node.module.partition(".")[2]
            found |= {name if (name := f"{module}.{one.name}".lstrip(".")) in known else module for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name.partition(".")[2] for one in node.names if one.name.split(".")[0] == "jaxrank"}
    return found


def entry(module: str) -> tuple[int, str]:
    """The line and the entry of a module: the longest that it is in."""
    entries = [(i, name) for i, names in enumerate(LAYERS) for name in names]
    return max(
        ((i, name) for i, name in entries if f"{module}.".startswith(f"{name}.")), key=lambda found: len(found[1])
    )


def test_imports_point_downwards() -> None:
    found = modules()
    seen = 0
    for module, path in found.items():
        for target in imported(path, found) - {""}:
            if module in ("", "__main__"):
                continue
            seen += 1
            (mine, own), (line, name) = entry(module), entry(target)
            assert name == own or line < mine, f"{path} imports jaxrank.{target}"
    assert seen > 300


def test_no_circles() -> None:
    found = modules()
    graph = {module: imported(path, found) & found.keys() - {"", module} for module, path in found.items()}
    TopologicalSorter(graph).prepare()


def test_heavy_or_test_only_libraries_stay_out():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                assert top != "torch" or module == "cross_encoder" or module.startswith("convert"), path
                web = ("fastapi", "starlette", "uvicorn", "h11", "httpcore2", "prometheus_client", "opentelemetry")
                assert top not in web or module.startswith("server"), path
                assert top != "av" or module in ("media.video", "media.decoding_child"), f"{path} imports av"
                assert top != "ray" or module in ("server.on_ray.app", "ray_data"), f"{path} imports ray"
                assert top != "pyarrow" or module == "offline.parts", f"{path} imports pyarrow"
                assert top != "mteb" or module == "mteb", f"{path} imports mteb"
                assert top not in ("pytest", "sentence_transformers", "optax"), path


def test_what_decodes_untrusted_files_loads_little():
    code = "import sys, jaxrank.media.decoding_child as _; print({'jax', 'torch', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names():
    assert set(jaxrank.__all__) == {
        "CheckpointError", "CrossEncoder", "JaxrankError", "ModelError", "Ranked", "RequestError", "Reranker",
        "TooLongError", "UnsupportedError", "__version__",
    }  # fmt: skip
    for name in jaxrank.__all__:
        assert getattr(jaxrank, name) is not None
