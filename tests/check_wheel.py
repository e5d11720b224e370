"""The built wheel holds every module of the tree, and runs outside the checkout. Run by `make check`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 14_000_000
"""Bytes of a wheel: the built-in model's 12 MB, and the code."""


def modules() -> set[str]:
    """Paths inside the wheel of every module of the three source folders."""
    found = {f"jaxrank/{path.relative_to(ROOT / 'jaxrank')}" for path in (ROOT / "jaxrank").rglob("*.py")}
    for folder in ("convert", "server"):
        found |= {f"jaxrank/{folder}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", scratch, str(ROOT)], check=True, capture_output=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        missing = modules() - names
        assert not missing, f"the wheel lacks {sorted(missing)}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
            assert f"jaxrank/builtin/{name}" in names, f"the wheel lacks the built-in model's {name}"
        assert "jaxrank/server/http/page.html" in names, "the wheel lacks the page"
        templates = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxrank/text/templates").rglob("*.jinja")}
        assert templates, "no templates were found"
        assert templates <= names, f"the wheel lacks {sorted(templates - names)}"
        tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
        assert tops == {"jaxrank"}, f"the wheel installs {sorted(tops)}"
        assert wheel.stat().st_size < LIMIT, f"the wheel has {wheel.stat().st_size} bytes"

        inside = Path(scratch) / "venv"
        venv.create(inside, with_pip=True, system_site_packages=False)
        python = inside / "bin" / "python"
        # dependencies come from this environment; only jaxrank itself is installed anew
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        libraries = next(Path(sys.prefix).glob("lib/python*/site-packages"))
        code = (
            f"import sys; sys.path.append({str(libraries)!r}); import jaxrank; "
            f"assert jaxrank.__file__.startswith({str(inside)!r}), jaxrank.__file__; "
            "from jaxrank import Reranker, convert, server; "
            "documents = ['hi', 'The giant panda, also called a panda bear, is a bear species endemic to China.']; "
            "best = Reranker.from_pretrained(compile_cache=None).rank('what is panda?', documents)[0]; "
            "assert best.index == 1, best"
        )
        subprocess.run([python, "-c", code], check=True, cwd=scratch)
    print(f"wheel: {len(names)} files, {len(modules())} modules, ranks outside the checkout")


if __name__ == "__main__":
    main()
