"""The `jaxrank` command: what it prints, its exit status, and one clear line for whatever goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxrank import __version__, cli
from jaxrank.reranker import DEFAULT_CACHE
from jaxrank.types import Ranked
from tests.checkpoints import TEXT, edit_config, make_bge

PANDA = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, "
    "is a bear species endemic to China."
)
NO_CACHE = ("--compile-cache", "none")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, as the interpreter would end it."""

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            status: Any = cli.main([str(argument) for argument in argv])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        if isinstance(status, str):  # the interpreter prints it
            return Outcome(1, out, f"{err}{status}\n")
        return Outcome(status or 0, out, err)

    return call


def complaint(outcome: Outcome) -> str:
    """The one line on stderr of a command that failed."""
    assert (outcome.status, outcome.out) == (1, "")
    assert re.fullmatch(r"jaxrank: .*\n", outcome.err), outcome.err
    return outcome.err


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=130)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text(f"hi\n\n{PANDA}\n  \nParis is the capital of France.\n", encoding="utf-8")
    return path


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_version_without_loading_jax() -> None:
    check = "import sys; from jaxrank.cli import main\ntry: main(['--version'])\nfinally: print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == (f"jaxrank {__version__}\nFalse\n", "", 0)


@pytest.mark.parametrize(
    "line", ["", "fly", "rerank", "convert a", "serve --port x", "serve --dtype int8", "serve --x"]
)
def test_usage(run: Run, line: str) -> None:
    status, out, err = run(*line.split())
    assert (status, out) == (2, "")
    assert err.startswith("usage: jaxrank")
    assert "error: " in err.splitlines()[-1]


class Longest:
    """Instead of a model: the longer the better."""

    def rank(self, query: str, documents: list[str], *, top_n: int | None, progress: bool) -> list[Ranked]:
        if query == "wait":
            raise KeyboardInterrupt
        ranked = [Ranked(i, len(text) / 1000, text) for i, text in enumerate(documents)]
        return sorted(ranked, key=lambda item: -item.score)[:top_n]


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load", lambda *_: Longest())


class TestRerank:
    @pytest.mark.parametrize("stdin, top_n", [(False, 3), (True, 2)], ids=["file", "standard input"])
    def test_builtin_model(
        self, run: Run, documents: Path, monkeypatch: pytest.MonkeyPatch, stdin: bool, top_n: int
    ) -> None:
        standard_input(monkeypatch, documents.read_bytes() if stdin else b"")
        place = "-" if stdin else documents
        status, out, err = run("rerank", "what is panda?", place, "--top-n", top_n, *NO_CACHE)
        assert (status, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        assert [list(line) for line in lines] == [["index", "score", "document"]] * top_n
        assert lines[0]["index"] == 1, "blank lines are not counted"
        assert lines[0]["document"] == PANDA
        scores = [line["score"] for line in lines]
        assert scores == sorted(scores, reverse=True)
        assert 1 > scores[0] > 2 * scores[1] > 0

    @pytest.mark.parametrize("terminal", [True, False])
    @pytest.mark.parametrize("form", ["auto", "table", "jsonl"])
    @pytest.mark.usefixtures("longest")
    def test_table_on_a_terminal_and_json_in_a_pipe(
        self, run: Run, documents: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, form: str
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("COLUMNS", "60")
        status, out, _ = run("rerank", "q", documents, "--top-n", 1, "--format", form)
        assert status == 0
        if form == "table" or (form == "auto" and terminal):
            text = "The giant panda (Ailuropoda melanol…"
            assert out == f"rank    score   index  document\n   1   0.1240       1  {text}\n"
        else:
            assert json.loads(out) == {"index": 1, "score": 0.124, "document": PANDA}

    @pytest.mark.parametrize(
        "text, shown",
        [
            ("x" * 37, "x" * 35 + "…"),
            ("北京" * 30, "北京" * 8 + "北…"),  # two columns each
            ("北" * 18, "北" * 18),
            ("a\tb\x1b[31mred\x07   c", "a b [31mred c"),
            ("word " * 7, "word word word word word word word"),
        ],
    )
    def test_table_fits_the_terminal(self, text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        out = io.StringIO()
        cli.write_table([Ranked(12, 0.5, text)], out)
        assert out.getvalue().splitlines()[1] == f"   1   0.5000      12  {shown}"

    @pytest.mark.usefixtures("longest")
    def test_a_line_is_a_document(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Form feeds and Unicode's separators stay within one, as they do for every other tool that reads lines."""
        standard_input(monkeypatch, "a\r\n\r\nb\u2028bb\n c\x0cccc\x85c \r北京北京北京北京".encode())
        status, out, _ = run("rerank", "q", "--format", "jsonl")
        got = {line["index"]: line["document"] for line in map(json.loads, out.split("\n")[:-1])}
        assert (status, got) == (0, {0: "a", 1: "b\u2028bb", 2: " c\x0cccc\x85c ", 3: "北京北京北京北京"})

    @pytest.mark.usefixtures("longest")
    def test_interrupted(self, run: Run, documents: Path) -> None:
        assert run("rerank", "wait", documents) == (130, "", "")

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"good\nbad \xff\n", "not UTF-8 text at byte 9"),
            (b"", "no documents; one a line is read, blank lines are skipped"),
            (b"\n  \n\t\n", "no documents"),
        ],
    )
    def test_bad_documents(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
    ) -> None:
        path = tmp_path / "documents.txt"
        path.write_bytes(content)
        assert f"error: {path}: {message}" in complaint(run("rerank", "q", path))
        standard_input(monkeypatch, content)
        assert f"error: standard input: {message}" in complaint(run("rerank", "q"))

    def test_no_file(self, run: Run, tmp_path: Path) -> None:
        assert f"{tmp_path}/x: No such file or directory; give a" in complaint(run("rerank", "q", tmp_path / "x"))
        assert f"{tmp_path}: Is a directory; give a text file" in complaint(run("rerank", "q", tmp_path))

    @pytest.mark.parametrize(
        "query, flags, message",
        [
            ("q", "--top-n 0", "top_n is 0; it must be at least 1"),
            ("q", "--max-model-len 7", "max_length is 7; this model takes 8 to 128 tokens"),
            ("q", "--context-length 129", "max_length is 129; this model takes 8 to 128 tokens"),
            ("q", "--row-tokens 1000000", "row_tokens is 1000000; a row takes 1 to 49152 tokens"),
            # bytes of the command line that are not UTF-8 arrive as lone surrogates
            (os.fsdecode(b"caf\xe9"), "", "query contains a lone surrogate at character 3"),
        ],
    )
    def test_bad_arguments(self, run: Run, source: Path, documents: Path, query: str, flags: str, message: str) -> None:
        assert message in complaint(run("rerank", query, documents, "--model", source, *flags.split(), *NO_CACHE))


def lose_a_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "there is no folder {folder}, and as a Hugging Face id it could not be fetched"),
    "no config": (lambda f: (f / "config.json").unlink(), "{folder}/config.json cannot be read (No such file"),
    "config cut short": (lambda f: (f / "config.json").write_text("{"), "{folder}/config.json is no JSON"),
    "config lacks a field": (lose_a_field, "config.json lacks 'hidden_size'"),
    "config of a wrong type": (
        lambda f: edit_config(f, max_position_embeddings="130"), "config.json has a field of a wrong type or size"),
    "another architecture": (
        lambda f: edit_config(f, architectures=["BertModel"]), "architectures is ['BertModel']; jaxrank knows XLMR"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "{folder}: no tokenizer.json (found: config.json"),
    "damaged tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 999), "tokenizer.json: not a tokenizer that"),
    "odd special token": (
        lambda f: (f / "tokenizer_config.json").write_text('{"sep_token": {"x": 1}}'), "sep_token None is not among"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "{folder} has no weights"),
    "weights cut short": (
        lambda f: os.truncate(f / "model.safetensors", 90_000), "{folder}/model.safetensors is damaged: its tensors"),
    "weights of one byte": (lambda f: os.truncate(f / "model.safetensors", 1), "safetensors has 1 bytes and a header"),
    ".bin weights": (to_bin, "code; write a folder that needs none with `jaxrank convert {folder} NEW_FOLDER`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.parametrize("command", ["rerank", "serve"])
def test_bad_models(run: Run, folder: Path, documents: Path, command: str, kind: str) -> None:
    damage, message = BAD_MODELS[kind]
    damage(folder)
    line = ["rerank", "q", documents, "--model", folder] if command == "rerank" else ["serve", folder, "--port", 0]
    assert message.format(folder=folder) in complaint(run(*line, *NO_CACHE))


def test_every_tensor_that_does_not_fit_is_named(run: Run, folder: Path, documents: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["classifier.dense.bias"]
    state["roberta.embeddings.LayerNorm.weight"] = torch.zeros(47)
    state["roberta.encoder.layer.1.output.dense.weight"] = torch.zeros(96, 48)
    save_file(state, folder / "model.safetensors")
    status, out, err = run("rerank", "q", documents, "--model", folder, *NO_CACHE)
    assert (status, out) == (1, "")
    assert [line.strip() for line in err.splitlines()] == [
        f"jaxrank: error: {folder} does not fit its config.json. Use the weights and the config.json of one model.",
        "missing tensors (1):",
        "classifier.dense.bias [48]",
        "wrong shapes (2):",
        "roberta.embeddings.LayerNorm.weight is [47], the model needs [48]",
        "roberta.encoder.layer.1.output.dense.weight is [96, 48], the model needs [48, 96]",
    ]


WEIGHTS_AND_SETTINGS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "")


@pytest.mark.parametrize(
    "victim, mode, line, named",
    [
        *((f"model/{name}", 0, "rerank q --model {0}/model", f"model/{name}") for name in WEIGHTS_AND_SETTINGS),
        ("", 0, "rerank q --model {0}/model", "model"),
        ("documents.txt", 0, "rerank q {0}/documents.txt", "documents.txt"),
        ("", 0, "convert {0}/model {0}/out --no-progress", "model"),
        ("", 0o555, "convert {0}/model {0}/out --no-progress", "out could not be written"),
    ],
)
def test_no_permission(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch, victim: str, mode: int, line: str, named: str
) -> None:
    """Root may do everything, so root becomes nobody meanwhile, in a folder that others can reach (not pytest's)."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(source, place / "model")
    (place / "documents.txt").touch()
    for path in (place, *place.rglob("*")):
        path.chmod(0o755)
    standard_input(monkeypatch, b"hi\n")
    user = os.geteuid()
    try:
        (place / victim).chmod(mode)
        os.seteuid(user or 65534)
        try:
            message = complaint(run(*line.format(place).split(), *(NO_CACHE if line[0] == "r" else ())))
        finally:
            os.seteuid(user)
        assert f"{place}/{named}" in message
        assert "Permission denied" in message
        place.chmod(0o755)
        assert sorted(os.listdir(place)) == ["documents.txt", "model"]
    finally:
        for path in (place, place / "model"):
            path.chmod(0o755)
        shutil.rmtree(place)


class TestConvert:
    @pytest.mark.parametrize("weights", ["safetensors", "bin"])
    def test_converted_models_score_the_same(
        self, run: Run, source: Path, folder: Path, documents: Path, tmp_path: Path, weights: str
    ) -> None:
        def scores(model: Path) -> list[tuple[int, float]]:
            status, out, err = run("rerank", "q", documents, "--model", model, "--dtype", "float32", *NO_CACHE)
            assert (status, err) == (0, "")
            return [(line["index"], line["score"]) for line in map(json.loads, out.splitlines())]

        documents.write_text("\n".join(TEXT))
        if weights == "bin":
            to_bin(folder)
        assert run("convert", folder, tmp_path / "new", "--no-progress") == (0, f"wrote {tmp_path}/new\n", "")
        want = scores(source)
        assert np.ptp([score for _, score in want]) > 0.01
        assert scores(tmp_path / "new") == want

    def test_existing_folders(self, run: Run, source: Path, tmp_path: Path) -> None:
        line = ["convert", source, tmp_path / "out", "--no-progress"]
        assert run(*line, "--dtype", "bfloat16").status == 0
        assert "out exists; choose another folder, or allow overwriting (--overwrite)" in complaint(run(*line))
        assert '"bfloat16"' in (tmp_path / "out/jaxrank.json").read_text()
        assert run(*line, "--overwrite").status == 0
        assert '"float32"' in (tmp_path / "out/jaxrank.json").read_text()

    def test_full_disk(self, source: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the disk. In a process of its own, where threads may complain too."""
        program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        program += "from jaxrank.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "convert", source, tmp_path / "out", "--no-progress"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        line = complaint(Outcome(result.returncode, result.stdout, result.stderr))
        assert re.search(f"{tmp_path}/out could not be written: .*; nothing was left there", line)
        assert os.listdir(tmp_path) == []


LAUNCH = r"""
python3 -m sglang.launch_server \
  --model-path BAAI/bge-reranker-v2-m3 \
  --host 0.0.0.0 \
  --disable-radix-cache \
  --chunked-prefill-size -1 \
  --attention-backend triton \
  --is-embedding \
  --port 30000
"""
"""SGLang's documented launch line for BGE, the same in its older and its newer documentation."""

ALL_FLAGS = """some/model --host ::1 --port 8001 --api-key one --api-key two --served-model-name bge --dtype float32
    --max-documents 7 --max-body-bytes 1000 --max-model-len 300 --row-tokens 512 --revision v2 --compile-cache x"""


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What would be loaded and how it would be served, instead of doing it."""
        calls: list[tuple[dict[str, Any], dict[str, Any]]] = []
        load = staticmethod(lambda model, **settings: {"model": model, **settings})
        monkeypatch.setattr("jaxrank.reranker.Reranker.from_pretrained", load)
        monkeypatch.setattr("jaxrank.server.serve", lambda loaded, **how: calls.append((loaded, how)) or 0)
        return calls

    @pytest.mark.parametrize("more", ["", " --trust-remote-code --mem-fraction-static 0.8 --skip-server-warmup"])
    def test_launch_lines_of_sglang(self, run: Run, served: list[Any], more: str) -> None:
        """Only the program's name changes."""
        line = LAUNCH.replace("python3 -m sglang.launch_server", "jaxrank serve").replace("\\\n", " ") + more
        program, *argv = shlex.split(line)
        assert program == "jaxrank"
        status, out, err = run(*argv)
        assert (status, out) == (0, "")
        ((loaded, how),) = served
        assert loaded["model"] == "BAAI/bge-reranker-v2-m3"
        assert (how["host"], how["port"], how["api_keys"]) == ("0.0.0.0", 30000, [])
        flags = [word for word in argv if word.startswith("--")]
        meaningless = sorted(flag for flag in flags if flag not in ("--model-path", "--host", "--port"))
        assert err.splitlines() == [
            f"jaxrank: {flag} is accepted for SGLang's launch lines and means nothing here" for flag in meaningless
        ]

    def test_every_flag_reaches_its_place(self, run: Run, served: list[Any]) -> None:
        assert run("serve") == run("serve", *ALL_FLAGS.split()) == (0, "", "")
        assert served[0] == (
            dict(model=None, dtype="bfloat16", max_length=None, row_tokens=None, revision=None,
                 compile_cache=DEFAULT_CACHE),
            dict(host="127.0.0.1", port=30000, served_model_name=None, api_keys=[], max_documents=1000,
                 max_body_bytes=8_000_000),
        )  # fmt: skip
        assert served[1] == (
            dict(model="some/model", dtype="float32", max_length=300, row_tokens=512, revision="v2", compile_cache="x"),
            dict(host="::1", port=8001, served_model_name="bge", api_keys=["one", "two"], max_documents=7,
                 max_body_bytes=1000),
        )  # fmt: skip
        run("serve", *NO_CACHE)
        assert served[2][0]["compile_cache"] is None

    @pytest.mark.parametrize("line", ["m", "--model-path m", "--model m", "--model-id m", "m --model m --model-id m"])
    def test_a_model_by_any_name(self, run: Run, served: list[Any], line: str) -> None:
        assert run("serve", *line.split()) == (0, "", "")
        assert served[0][0]["model"] == "m"

    @pytest.mark.parametrize(
        "line, message",
        [
            ("a --model-path b", "2 models named, a and b; name one"),
            ("--model a --model-id b", "2 models named, a and b; name one"),
            ("--api-key=", "--api-key is empty; give a key"),
        ],
    )
    def test_contradictions(self, run: Run, served: list[Any], line: str, message: str) -> None:
        assert message in complaint(run("serve", *line.split()))
        assert served == []

    def test_ports_that_cannot_be_had(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "load", lambda *_: SimpleNamespace(name="m"))
        out_of_range = complaint(run("serve", "--port", 70000))
        assert "cannot listen on 127.0.0.1 port 70000: bind(): port must be 0-65535" in out_of_range
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = complaint(run("serve", "--port", port))
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another port" in line


ECHO = """
import resource, sys
from dataclasses import make_dataclass
from jaxrank import cli
Item = make_dataclass("Item", ["index", "score", "document"])
class Echo:
    def rank(self, query, documents, **_):
        return [Item(i, 0.5, document) for i, document in enumerate(documents)]
cli.load = lambda *_: Echo()
if sys.argv[1] == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
sys.exit(cli.main(["rerank", "q"]))
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("count", [1, 3000], ids=["within the buffer", "beyond it"])
@pytest.mark.parametrize(
    "full, status, err", [("pipe", 0, b""), ("disk", 1, b"jaxrank: error: [Errno 27] File too large\n")]
)
def test_output_that_nobody_takes(tmp_path: Path, full: str, status: int, err: bytes, count: int) -> None:
    """In a process of its own: the interpreter, too, writes when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with (tmp_path / "out").open("wb") as file, os.fdopen(writer, "wb") as pipe:
        result = subprocess.run(
            [sys.executable, "-c", ECHO, full], input=b"a document\n" * count, stdout=pipe if full == "pipe" else file,
            stderr=subprocess.PIPE, env=BUFFERED, timeout=60,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (status, err)


def test_head(tmp_path: Path) -> None:
    """The whole command in a pipe, with more to say than a pipe holds."""
    (tmp_path / "documents.txt").write_text(f"{PANDA * 15}\n" * 100)
    program = (
        f"{shlex.quote(sys.executable)} -m jaxrank rerank 'what is panda?' --max-model-len 16 {' '.join(NO_CACHE)}"
    )
    line = f"set -o pipefail; {program} {shlex.quote(str(tmp_path))}/documents.txt | head -n 1"
    result = subprocess.run(["bash", "-c", line], env=BUFFERED, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["document"] == PANDA * 15
