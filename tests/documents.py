"""Parses README and docs/ for their tests: links, anchors, code blocks and the commands in them."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`((?:[^`\n]|\n(?!\n))+)`(?!`)")
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
OF_THE_CLIENT = {"extra_body", "timeout", "cast_to"}
"""Arguments of a call that are no fields of the request."""
_SEPARATORS = {"|", "||", "&&", "&", ";", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced code block: its place, its language ("" if none is named) and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find_blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return [block for block in found if block.language in languages]


def find_links(page: Path) -> list[str]:
    """Returns the targets of links and images."""
    return [match[1] for match in _LINK.finditer(_INLINE.sub("`code`", _prose(page)))]


def find_inline_code(page: Path) -> list[str]:
    return [" ".join(match[1].split()) for match in _INLINE.finditer(_prose(page))]


def find_anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of the headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", _prose(page), re.MULTILINE):
        text = _LINK.sub(lambda match: match[0][1:].partition("](")[0], heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = sum(each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None for each in anchors)
        anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


def find_commands(block: Block) -> Iterator[list[str]]:
    """Yields the words of each simple command of a shell block; in a transcript, of the lines that begin with
    `$`."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if not block.language:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        yield from _split(line)


def option_of(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def form_fields_of(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the form fields of a curl command, with an image in place of each file."""
    for name, value in pairwise(words):
        if name in {"-F", "--form-string"}:
            field, _, given = value.partition("=")
            if not given.startswith("@"):
                yield field, given
            else:
                yield field, (_picture(),) if field == "image" else _picture()


def call_fields_of(call: ast.Call) -> dict[str, Any]:
    """Returns the literal fields of a call of OpenAI's Python client, with an image in place of each file."""
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    fields = {"prompt": "not written out"}
    if "extra_body" in given:
        fields |= ast.literal_eval(given["extra_body"])
    for name, value in given.items():
        if name in OF_THE_CLIENT:
            continue
        try:
            fields[name] = ast.literal_eval(value)
        except ValueError:
            if name in {"image", "mask", "control_image", "input_reference"}:
                fields[name] = (_picture(),) if name == "image" else _picture()
    return fields


def _picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in lexer:
        if token not in _SEPARATORS:
            words.append(token)
        elif token in {">", ">>", "<"}:
            next(lexer, None)
        else:
            yield words
            words = []
    yield words


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())
