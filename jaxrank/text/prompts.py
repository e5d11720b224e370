"""Prompts: a chat template becomes text with gaps for instruct, query and document, once, when a model is loaded.

A template is rendered once, with marks in place of the texts. At request time the texts are put into the gaps as token
ids. So nothing in them can be mistaken for the template's own markup, and no template runs on what users send.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxrank.errors import RequestError

TEMPLATES = Path(__file__).parent / "templates"
PROMPTS = {"qwen3": ("official", "sglang", "vllm", "none"), "qwen3_vl": ("official", "none")}
"""Built-in prompts by family.

"official" is the publisher's. "sglang" is SGLang's, without the think block at the end. "vllm" is vLLM's, which has one
newline less than the publisher's. "none" is the bare query and document side by side. For Qwen3-VL the first three
write the same text.
"""

STEPS = 20_000
"""The number of template lines that may run. A template that loops for longer is refused."""

MOST_CHARACTERS = 100_000


class Slot(Enum):
    """A gap that a request fills."""

    INSTRUCT = "instruct"
    QUERY = "query"
    DOCUMENT = "document"


Piece = str | Slot
"""A part of a prompt: the template's own text, markup included, or a gap."""


@dataclass(frozen=True)
class Prompt:
    """The text around and between the gaps: one version for requests without an instruct, and one for those with it."""

    plain: tuple[Piece, ...]
    instructed: tuple[Piece, ...]

    @property
    def takes_instruct(self) -> bool:
        return Slot.INSTRUCT in self.instructed


def load_prompt(name: str = "official", template: str | Path | None = None, family: str = "qwen3") -> Prompt:
    """Return one of the family's PROMPTS, or the prompt that a user's template file renders.

    Templates of three conventions are understood:

    - SGLang's text convention: `messages[0].content`, `messages[1].content`, `instruct`.
    - SGLang's multimodal convention: `query` and `document` as lists of parts with `type` and `text`, and `instruct`.
    - vLLM's convention: messages with the roles `system` (the instruct), `query` and `document`.

    Like in transformers, the sandbox strips the newlines of blocks and one newline at the end. A template must put
    query and document in unchanged. One that changes them is refused, because it does not run for every text.

    Raises:
        RequestError: the prompt is unknown, or the template fails. The message names the template's line.
    """
    if template is None and name not in PROMPTS[family]:
        raise RequestError(f"prompt {name!r} is unknown; one of {', '.join(PROMPTS[family])}")
    path = Path(template) if template is not None else TEMPLATES / family / f"{name}.jinja"
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"chat template {path}: cannot be read ({reason}); name a Jinja file") from error
    return Prompt(_pieces(path, source, with_instruct=False), _pieces(path, source, with_instruct=True))


def _pieces(path: Path, source: str, *, with_instruct: bool) -> tuple[Piece, ...]:
    """Cut the rendered template at the marks that stand for the texts, and check it against a rendering of texts."""
    slots = [slot for slot in Slot if with_instruct or slot is not Slot.INSTRUCT]
    marks = {slot: f"\ufdd0{slot.value}\ufdd1" for slot in slots}  # these are noncharacters, so no text has them
    samples = {slot: f"  A <b>{slot.value}</b> & 'more'\n\"{{{{ 7 }}}}\"\n " for slot in slots}
    cut = re.split("(" + "|".join(marks.values()) + ")", render(path, source, marks))
    names = {mark: slot for slot, mark in marks.items()}
    pieces = tuple(names.get(part, part) for part in cut if part)
    shown = render(path, source, samples)
    if "".join(samples[p] if isinstance(p, Slot) else p for p in pieces) != shown:
        raise RequestError(
            f"chat template {path}: it changes the texts that it is given, or what stands around them by what they "
            "are; write the variables alone, without filters or conditions on them"
        )
    for slot in (Slot.QUERY, Slot.DOCUMENT):
        if pieces.count(slot) != 1:
            raise RequestError(
                f"chat template {path}: the {slot.value} is in what it renders {pieces.count(slot)} times; it must be "
                "once. Known are messages[0].content and messages[1].content, the roles query and document, and query "
                "and document as lists of parts"
            )
    return pieces


def render(path: Path, source: str, texts: dict[Slot, str]) -> str:
    """Return the template's text with these texts put in.

    Raises:
        RequestError: the template fails. The message names the line.
    """
    query, document, instruct = (texts.get(slot) for slot in (Slot.QUERY, Slot.DOCUMENT, Slot.INSTRUCT))
    system = [] if instruct is None else [{"role": "system", "content": instruct}]
    values: dict[str, Any] = {
        "messages": [{"role": "query", "content": query}, {"role": "document", "content": document}, *system],
        "query": [{"type": "text", "text": query}],
        "document": [{"type": "text", "text": document}],
        "add_generation_prompt": True,
    }
    if instruct is not None:  # otherwise it stays undefined, so that default() works
        values["instruct"] = values["instruction"] = instruct

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.globals["raise_exception"] = refuse
    try:
        text = _bounded(lambda: sandbox.from_string(source).render(values))
    except Exception as error:  # a template can fail in any way that Python can
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else (lines or [None])[-1]
        where = f", line {line}" if line else ""
        raise RequestError(f"chat template {path}{where}: {type(error).__name__}: {str(error)[:300]}") from error
    if len(text) > MOST_CHARACTERS:
        raise RequestError(f"chat template {path}: it renders {len(text)} characters; a prompt has a few hundred")
    return text


class TooManySteps(Exception):
    """A template loops."""


def _bounded(work: Callable[[], str]) -> str:
    """Return work(), but raise TooManySteps after STEPS lines of Python.

    The sandbox limits what a template can reach, but not how long it runs.
    """
    left = STEPS

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename == "<template>":
            left -= event == "line"
            if left < 0:
                raise TooManySteps(f"it loops: more than {STEPS} lines of it were run")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return work()
    finally:
        sys.settrace(before)


class Texts(NamedTuple):
    """What a request asks to be scored.

    Attributes:
        instruct: the instruction.
        query: the query.
        documents: the documents.
        before: the number of characters that stood before each document, if it had a frame.
    """

    instruct: str | None
    query: str
    documents: Sequence[str]
    before: int = 0


FRAMED_QUERY = re.compile(
    r"<\|im_start\|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    r'provided\. Note that the answer can only be "yes" or "no"\.<\|im_end\|>\n<\|im_start\|>user\n'
    r"<Instruct>: (?P<instruct>.*?)\n{1,2}<Query>: (?P<query>.*?)\n{0,2}",
    re.DOTALL,
)
FRAMED_DOCUMENT = re.compile(
    r"<Document>: (?P<document>.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(<think>\n\n</think>\n{0,2})?", re.DOTALL
)


def unwrap(texts: Texts) -> Texts:
    """Take the texts out of the publisher's frame, if a client has put it around them. Return others as they are.

    vLLM's examples do so: the query comes with everything before the document, and the documents with everything after
    it. Without this function the frame would be tokenised as text, and would stand there twice.
    """
    query = FRAMED_QUERY.fullmatch(texts.query)
    found = [FRAMED_DOCUMENT.fullmatch(document) for document in texts.documents] if query else []
    documents = [match for match in found if match]
    if not query or not documents or len(documents) < len(found):
        return texts
    inner = [match["document"] for match in documents]
    return Texts(query["instruct"], query["query"], inner, documents[0].start("document"))
