"""Chat templates: the built-in ones, users' files in three conventions, and those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.publisher import INSTRUCT, PREFIX, SUFFIX
from jaxrank.errors import RequestError
from jaxrank.text.prompts import PROMPTS, Prompt, Slot, Texts, load_prompt, unwrap


def write(prompt: Prompt, query: str, document: str, instruct: str | None = None) -> str:
    """The prompt's text with these texts in its gaps."""
    texts = {Slot.QUERY: query, Slot.DOCUMENT: document, Slot.INSTRUCT: instruct}
    pieces = prompt.plain if instruct is None else prompt.instructed
    return "".join(str(texts[piece]) if isinstance(piece, Slot) else piece for piece in pieces)


def template(folder: Path, text: str) -> Prompt:
    file = folder / "mine.jinja"
    file.write_text(text)
    return load_prompt(template=file)


SGLANG_END = "<|im_end|>\n<|im_start|>assistant\n"
BUILT_IN = {
    "official": (INSTRUCT, SUFFIX),
    "sglang": (INSTRUCT + ".", SGLANG_END),
    "vllm": (INSTRUCT, SUFFIX[:-1]),
}


class TestBuiltIn:
    @pytest.mark.parametrize("name", BUILT_IN)
    def test_text(self, name: str) -> None:
        default, end = BUILT_IN[name]
        prompt = load_prompt(name)
        assert write(prompt, "q", "d") == f"{PREFIX}<Instruct>: {default}\n<Query>: q\n<Document>: d{end}"
        assert write(prompt, "q", "d", "i") == f"{PREFIX}<Instruct>: i\n<Query>: q\n<Document>: d{end}"

    def test_none(self) -> None:
        prompt = load_prompt("none")
        assert write(prompt, "q ", "d") == "q d"
        assert not prompt.takes_instruct

    def test_all_are_listed(self) -> None:
        assert set(PROMPTS["qwen3"]) == {*BUILT_IN, "none"}

    def test_unknown(self) -> None:
        with pytest.raises(RequestError, match="prompt 'offical' is unknown; one of official, sglang, vllm, none"):
            load_prompt("offical")


CONVENTIONS = {
    "SGLang text": """S<|im_end|>
I: {{ instruct | default("judge") }}
Q: {{ messages[0]["content"] }}
D: {{ messages[1]["content"] }}<|im_end|>
""",
    "SGLang multimodal": """S<|im_end|>
I: {{ instruct | default("judge") }}
Q: {% for part in query %}
{%- if part.type == "text" %}{{ part.text }}{% elif part.type == "image" %}<|image_pad|>{% endif %}
{%- endfor %}

D: {% for part in document %}{% if part["type"] == "text" %}{{ part["text"] }}{% endif %}{% endfor %}<|im_end|>
""",
    "vLLM": """S<|im_end|>
I: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default("judge") }}
Q: {{
    messages
    | selectattr("role", "eq", "query")
    | map(attribute="content")
    | first
}}
D: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
""",
}


class TestUsersFiles:
    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_conventions(self, tmp_path: Path, convention: str) -> None:
        prompt = template(tmp_path, CONVENTIONS[convention])
        assert write(prompt, "q", "d") == "S<|im_end|>\nI: judge\nQ: q\nD: d<|im_end|>"
        assert write(prompt, "q", "d", "i") == "S<|im_end|>\nI: i\nQ: q\nD: d<|im_end|>"

    @pytest.mark.parametrize(
        "text, message",
        [
            ("a\n{% if %}", "mine.jinja, line 2: TemplateSyntaxError"),
            ("a\nb\n{{ raise_exception('only chats') }}", "mine.jinja, line 3: TemplateError: only chats"),
            ("a\n{{ 1 / 0 }}", "mine.jinja, line 2: ZeroDivisionError"),
            ("{{ messages.__class__.__mro__ }}", "line 1: SecurityError: access to attribute '__class__'"),
            ("\n{{ cycler.__init__.__globals__ }}", "line 2: SecurityError: access to attribute '__init__'"),
            ("{{ messages.append(1) }}", "line 1: SecurityError"),
            ("{% set x = range(10 ** 9) | list %}", "line 1: OverflowError: Range too big"),
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                "line 1: TooManySteps: it loops: more than 20000 lines",
            ),
            ("{{ 'a' * 200_000 }}", "it renders 200000 characters"),
            ("{% include '/etc/passwd' %}", "line 1: TypeError: no loader"),
            ("{{ messages[1].content }}", "the query is in what it renders 0 times; it must be once"),
            ("{{ query[0].text }}", "the document is in what it renders 0 times"),
            ("{{ query[0].text }}{{ document[0].text * 2 }}", "the document is in what it renders 2 times"),
            ("{{ messages[0].content | trim }}{{ messages[1].content }}", "it changes the texts that it is given"),
            ("{{ messages[0].content | e }}{{ messages[1].content }}", "it changes the texts that it is given"),
            (
                "{% if messages[0].content | length > 20 %}long{% endif %}{{ query[0].text }}{{ document[0].text }}",
                "it changes the texts that it is given",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(RequestError) as caught:
            template(tmp_path, text)
        assert message in str(caught.value)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"none\.jinja: cannot be read \(No such file"):
            load_prompt(template=tmp_path / "none.jinja")
        (tmp_path / "latin.jinja").write_bytes(b"\xe9{{ query }}")
        with pytest.raises(RequestError, match=r"latin\.jinja: cannot be read \(it is not UTF-8\)"):
            load_prompt(template=tmp_path / "latin.jinja")


class TestUnwrap:
    def test_the_clients_of_vllms_examples(self) -> None:
        query = f"{PREFIX}<Instruct>: judge\nwell\n<Query>: what\nis it?\n"
        for end in (SGLANG_END, SUFFIX, SUFFIX[:-1]):
            texts = Texts(None, query, [f"<Document>: a\n\nb{end}", f"<Document>: {end}"])
            assert unwrap(texts) == Texts("judge\nwell", "what\nis it?", ["a\n\nb", ""], len("<Document>: "))

    def test_others_stay_as_they_are(self) -> None:
        query = f"{PREFIX}<Instruct>: i\n<Query>: q\n"
        for texts in (
            Texts("i", "q", ["d"]),
            Texts(None, query, ["d"]),
            Texts(None, query, [f"<Document>: d{SUFFIX}", "d"]),
            Texts(None, "q", [f"<Document>: d{SUFFIX}"]),
            Texts(None, query, []),
            Texts(None, query.replace("Judge", "judge"), [f"<Document>: d{SUFFIX}"]),
        ):
            assert unwrap(texts) == texts
