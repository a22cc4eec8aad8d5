"""Make the emoji set: `python data/emoji/make.py`.

It needs npm with its registry, and the Python package `emoji` (pip install emoji==2.16.0). The
packages of pictures and names are pinned, so every run writes the same bytes with the same libwebp.
README.md describes the set.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps
from webdataset import TarWriter

from data.captions import Caption, captions_to_json
from data.files import atomic_file, atomic_folder, file_digest
from data.noise import permutation
from data.pixels import PixelOptions, convert_image, open_image

FOLDER = Path(__file__).parent
SIZE = 64  # height and width of the pictures, in pixels
SHARD = 1024  # pictures of a tar
HELD_OUT = 200  # names with a held-out picture
SEED = 0  # of the choice of these names
EMOJI_VERSION = "2.16.0"  # of the Python package
FULLY_QUALIFIED = 2  # a status in the Python package
SKIN_TONES = set("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
COUNTRY_FLAGS = ("country-flag", "subdivision-flag")

# Pictures of Fluent's package that are not what their file name says: `cat face` is a copy of
# `grinning cat`, and the other two are swapped.
MISASSIGNED = ("cat face", "deaf man", "deaf woman")
# Names of which the Python package leaves out the punctuation, by how they begin or end.
GROUPS = ("family", "kiss", "couple with heart")
HAIR = ("red hair", "curly hair", "white hair", "blond hair", "bald", "beard")

ARTICLES: dict[str, list[str]] = json.loads((FOLDER / "articles.json").read_text("utf-8"))


class Style(NamedTuple):
    """One designer's pictures, and the npm package that has them."""

    word: str  # in captions
    package: str
    version: str
    integrity: str  # base64 of the sha512 of the package's file, as npm states it
    folder: str  # of the pictures in the package
    suffix: str  # of the pictures


STYLES = (
    Style(
        "noto",
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64",
        ".png",
    ),
    Style(
        "3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets",
        ".webp",
    ),
    Style(
        "flat",
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64",
        ".png",
    ),
)
STYLE_WORDS = [style.word for style in STYLES]


class Emoji(NamedTuple):
    """What an emoji shows."""

    code: str  # its code points, such as 1f34e or 2764-fe0f
    name: str
    category: str
    subcategory: str


class Picture(NamedTuple):
    """An emoji in one style."""

    emoji: Emoji
    style: str
    webp: bytes

    @property
    def key(self) -> str:
        return f"{self.emoji.code}-{self.style}"


def read_npm_files(style: Style, folder: Path) -> dict[str, bytes]:
    """Return the files of a style's npm package by their paths.

    Args:
        style: whose package.
        folder: into which npm writes it.

    Raises:
        ValueError: it is not the pinned one.
    """
    wanted = f"{style.package}@{style.version}"
    command = ["npm", "pack", wanted, "--json", "--pack-destination", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    path = folder / json.loads(done.stdout)[0]["filename"]
    data = path.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != style.integrity:
        raise ValueError(f"{wanted}: its sha512 is not the one in {__file__}")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content:
                files[member.name] = content.read()
    return files


def clean_name(text: str) -> str:
    """Return a name of the Python package as Unicode writes it: `:red_apple:` is "red apple".

    The commas and colons that the package leaves out are put back: "family: man, boy".
    """
    name = text.strip(":").replace("_", " ")
    for group in GROUPS:
        members = name.removeprefix(group).split()
        if name.startswith(f"{group} ") and members[0] != "mark":
            return f"{group}: {', '.join(members)}"
    for hair in HAIR:
        if name.endswith(f" {hair}"):
            return f"{name.removesuffix(f' {hair}')}: {hair}"
    return name


def read_names() -> dict[str, str]:
    """Return the name of each fully-qualified emoji without a skin tone, by its code points.

    Raises:
        ValueError: another version of the Python package is installed.
    """
    import emoji

    if emoji.__version__ != EMOJI_VERSION:
        raise ValueError(
            f"the package emoji is {emoji.__version__}; run `pip install emoji=={EMOJI_VERSION}`"
        )
    names = {}
    for characters, facts in emoji.EMOJI_DATA.items():
        if facts["status"] == FULLY_QUALIFIED and not SKIN_TONES & set(characters):
            code = "-".join(f"{ord(character):x}" for character in characters)
            names[code] = clean_name(facts["en"])
    return names


def list_emoji(table: bytes, names: Mapping[str, str]) -> list[Emoji]:
    """Return the emoji that have a name and are in a package's table, in Unicode's order.

    Args:
        table: emoji.json of the package.
        names: by code points.
    """
    found = []
    for entry in sorted(json.loads(table), key=lambda entry: entry["sort_order"]):
        code = "-".join(f"{int(point, 16):x}" for point in entry["unified"].split("-"))
        if code in names:
            found.append(Emoji(code, names[code], entry["category"], entry["subcategory"]))
    return found


def has_picture(emoji: Emoji, style: str) -> bool:
    """Whether a style's picture of an emoji, if there is one, belongs to the set.

    Microsoft has no flags of countries: Fluent's package fills the gap with flat flags.
    """
    if style != "3d":
        return True
    return emoji.subcategory not in COUNTRY_FLAGS and emoji.name not in MISASSIGNED


def convert_picture(data: bytes, suffix: str, name: str) -> bytes:
    """Return a picture of SIZE x SIZE pixels on white, as lossless WebP.

    Args:
        data: of the picture in the package.
        suffix: of its file.
        name: of it, for the log.
    """
    image = convert_image(open_image(io.BytesIO(data), suffix), PixelOptions(), name)
    image = ImageOps.pad(image, (SIZE, SIZE), Image.Resampling.LANCZOS, color="white")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, exact=True, quality=75, method=6)
    return buffer.getvalue()


def list_pictures(
    style: Style, files: Mapping[str, bytes], emojis: Sequence[Emoji]
) -> Iterator[Picture]:
    """Yield the pictures of a style, in the order of the emoji."""
    by_code = {}
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        if folder == style.folder and name.endswith(style.suffix):
            points = name.removesuffix(style.suffix).replace("_", "").split("-")
            by_code["-".join(point.lstrip("0") for point in points)] = data
    for emoji in emojis:
        if emoji.code in by_code and has_picture(emoji, style.word):
            webp = convert_picture(by_code[emoji.code], style.suffix, emoji.name)
            yield Picture(emoji, style.word, webp)


def add_article(name: str) -> str:
    """Return a name with the article that English puts before it: "an eye", "grapes"."""
    for article in ("a", "an", "the"):
        if name in ARTICLES[article]:
            return f"{article} {name}"
    if name in ARTICLES["none"]:
        return name
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}"


def describe_emoji(emoji: Emoji) -> str:
    """Return what an emoji shows, as the object of a sentence."""
    if emoji.subcategory in COUNTRY_FLAGS:
        country = add_article(emoji.name) if emoji.name in ARTICLES["the"] else emoji.name
        return f"the flag of {country}"
    if emoji.subcategory == "zodiac":
        return f"the zodiac sign {emoji.name}"
    if emoji.name.endswith(("o’clock", "-thirty")):
        return f"a clock at {emoji.name}"
    return add_article(emoji.name)


def write_captions(emoji: Emoji, style: str) -> list[Caption]:
    """Return the captions of an emoji in a style; the last one leaves the style open."""
    shown = describe_emoji(emoji)
    return [
        Caption(f"a {style} emoji of {shown}", 3.0),
        Caption(f"{shown}, {style} emoji", 1.0),
        Caption(f"an emoji of {shown}", 1.0),
    ]


def choose_held_out(pictures: Iterable[Picture]) -> set[str]:
    """Return the keys of the held-out pictures: one style of each of HELD_OUT names.

    The names have all styles, and no name has the same picture. The styles take turns.
    """
    pictures = list(pictures)
    copies = Counter(picture.webp for picture in pictures)
    distinct = [picture for picture in pictures if copies[picture.webp] == 1]
    styles = Counter(picture.emoji.name for picture in distinct)
    names = sorted(name for name, count in styles.items() if count == len(STYLES))
    chosen = {}
    for i, position in enumerate(permutation(len(names), SEED)[:HELD_OUT]):
        chosen[names[position]] = STYLE_WORDS[i % len(STYLES)]
    return {picture.key for picture in distinct if chosen.get(picture.emoji.name) == picture.style}


def make_sample(picture: Picture) -> dict[str, str | bytes]:
    """Return a picture as a sample of a webdataset tar."""
    facts: dict[str, Any] = {
        "captions": captions_to_json(write_captions(picture.emoji, picture.style)),
        "category": picture.emoji.category,
        "name": picture.emoji.name,
        "style": picture.style,
    }
    return {
        "__key__": picture.key,
        "webp": picture.webp,
        "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode(),
    }


def write_tars(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures as tars of SHARD samples, in place of the earlier ones."""
    with atomic_folder(folder) as temporary:
        for start in range(0, len(pictures), SHARD):
            path = temporary / f"{start // SHARD:06d}.tar"
            with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
                for picture in pictures[start : start + SHARD]:
                    tar.write(make_sample(picture))


def list_checksums(out: Path) -> str:
    """Return the sha256 of every tar, as `sha256sum -c` reads them."""
    lines = []
    for path in sorted(out.glob("*/*.tar")):
        lines.append(f"{file_digest(path)}  {path.relative_to(out)}\n")
    return "".join(lines)


def draw_contact_sheet(pictures: Sequence[Picture], columns: int = 6, rows: int = 4) -> Image.Image:
    """Return a sheet of emoji in all styles, side by side, spread over Unicode's order."""
    by_code: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_code.setdefault(picture.emoji.code, []).append(picture)
    complete = [group for group in by_code.values() if len(group) == len(STYLES)]

    # Each cell has the styles of one emoji, with its name below.
    width = SIZE * len(STYLES) + 8
    height = SIZE + 20
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for cell in range(columns * rows):
        group = complete[cell * len(complete) // (columns * rows)]
        left = cell % columns * width
        top = cell // columns * height
        for i, picture in enumerate(group):
            sheet.paste(Image.open(io.BytesIO(picture.webp)), (left + i * SIZE, top))
        draw.text((left + 4, top + SIZE + 2), group[0].emoji.name, fill="black")
    return sheet


def make_set(out: Path, sheet: Path | None) -> None:
    """Make the set.

    Args:
        out: folder for train/, heldout/ and SHA256SUMS.
        sheet: file for a contact sheet; None makes none.
    """
    # Read the packages.
    names = read_names()
    with tempfile.TemporaryDirectory() as temporary:
        files = {style: read_npm_files(style, Path(temporary)) for style in STYLES}
    emojis = list_emoji(files[STYLES[0]]["package/emoji.json"], names)

    # Convert the pictures; the styles of an emoji follow each other.
    pictures: list[Picture] = []
    for style in STYLES:
        pictures += list_pictures(style, files[style], emojis)
    order = {emoji.code: i for i, emoji in enumerate(emojis)}
    pictures.sort(key=lambda picture: order[picture.emoji.code])

    # Write both parts.
    held_out = choose_held_out(pictures)
    train = [picture for picture in pictures if picture.key not in held_out]
    write_tars(out / "train", train)
    write_tars(out / "heldout", [picture for picture in pictures if picture.key in held_out])
    with atomic_file(out / "SHA256SUMS") as file:
        file.write(list_checksums(out).encode())
    if sheet:
        draw_contact_sheet(pictures).quantize(256).save(sheet, optimize=True)
    counts = Counter(picture.style for picture in pictures)
    print(f"{len(emojis):,} names, {len(pictures):,} pictures: {dict(counts)}")


def main() -> None:
    """Read the options and make the set."""
    parser = argparse.ArgumentParser(description="Make the emoji set from npm packages.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the tars")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet (PNG)")
    options = parser.parse_args()
    make_set(options.out, options.sheet)


if __name__ == "__main__":
    main()
