"""The pages of the documentation: their commands, programs and paths, and files of a user."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.helpers.commands import REPOSITORY

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS]
COMMAND = r"\s*(?:[A-Z_]+=\S* +)*((?:rectify|torchrun) .*)"  # perhaps after variables
FENCE = "```"


class Block(NamedTuple):
    """A block of code of a page."""

    language: str  # "" if the block is indented
    text: str


def code_blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of code of a page: fenced ones, and runs of lines indented by four."""
    language = ""
    lines: list[str] = []
    fenced = False
    for line in [*page.read_text().splitlines(), ""]:
        if line.strip().startswith(FENCE):
            if lines:
                yield Block(language, "\n".join(lines))
            lines = []
            fenced = not fenced
            language = line.strip().removeprefix(FENCE) if fenced else ""
        elif fenced or line.startswith("    "):
            lines.append(line)
        elif lines:
            yield Block(language, "\n".join(lines))
            lines = []


def inline_code(page: Path) -> list[str]:
    """Return the text between single backticks, outside blocks of code."""
    text = re.sub(rf"^ *{FENCE}.*?^ *{FENCE}$", "", page.read_text(), flags=re.M | re.S)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def documented_commands(page: Path) -> list[str]:
    """Return the commands in a page's blocks of code, each once, in order."""
    commands: list[str] = []
    for block in code_blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            found = re.match(COMMAND, line)
            if found:
                command = shlex.join(shlex.split(found[1], comments=True))
                if command not in commands:
                    commands.append(command)
    return commands


def programs(page: Path) -> list[str]:
    """Return the Python programs of a page."""
    return [block.text for block in code_blocks(page) if block.language == "python"]


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors


def write_captioned(folder: Path) -> None:
    """Write captioned pictures of two shapes, and a list of them."""
    (folder / "captioned").mkdir()
    rows = ["file_name,caption,alt"]
    for i in range(48):
        size = (60, 90) if i % 2 else (80, 70)
        Image.effect_noise(size, 40 + i).convert("RGB").save(folder / f"captioned/{i:02d}.png")
        (folder / f"captioned/{i:02d}.txt").write_text(f"noise, number {i}")
        rows.append(f"captioned/{i:02d}.png,noise number {i},noise")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
