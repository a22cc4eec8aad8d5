"""Small image files of every kind that users bring, and the pixels that each must give."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

SIZE = 16
RED_P3 = (230, 60, 50)  # in Display P3
RED_SRGB = (250, 31, 34)  # by the matrices of both, and the curve that they share
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
P3_CHROMATICITIES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_CHROMATICITIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
HIDDEN = (255, 0, 255)  # below a transparent pixel
COLOURS = ((200, 30, 40), (30, 180, 60), (40, 60, 220), (240, 230, 20))


class OddImage(NamedTuple):
    """A file, and what it shows."""

    name: str
    data: bytes
    shows: np.ndarray  # (H, W, 3) uint8
    error: int = 1  # levels by which a reader may differ


def quadrants() -> np.ndarray:
    """Return a picture of four colours, (16, 16, 3) uint8."""
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    half = SIZE // 2
    for i, colour in enumerate(COLOURS):
        top, left = divmod(i, 2)
        pixels[top * half :, left * half :] = colour
    return pixels


def ramp() -> np.ndarray:
    """Return a grey picture that gets brighter to the right, (16, 16) uint8."""
    return np.tile(np.arange(SIZE, dtype=np.uint8) * 17, (SIZE, 1))


def rgb(grey: np.ndarray) -> np.ndarray:
    """Return a grey picture with three equal channels."""
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """Return a file of pixels."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_block(*entries: tuple[int, int, bytes]) -> bytes:
    """Return an EXIF block with entries of (tag, type, four bytes)."""
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, value in sorted(entries):
        block += struct.pack("<HHI", tag, kind, 1) + value
    return b"Exif\0\0" + block + struct.pack("<I", 0)


def orientation(number: int) -> tuple[int, int, bytes]:
    """Return the EXIF entry of an orientation."""
    return 274, 3, struct.pack("<HH", number, 0)


def turned(pixels: np.ndarray, number: int) -> np.ndarray:
    """Return the pixels that are stored for a picture under an orientation."""
    stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    return np.ascontiguousarray(stored[number](pixels))


def fixed(value: float) -> bytes:
    """Return a number in the fixed-point format of profiles."""
    return struct.pack(">i", round(value * 65536))


def profile(
    space: bytes, curve: tuple[float, ...], columns: dict[bytes, tuple[float, ...]]
) -> bytes:
    """Return an ICC profile of a grey or RGB space.

    Args:
        space: `GRAY` or `RGB `.
        curve: parameters of the tone curve.
        columns: XYZ of tags, such as the primaries `rXYZ`, `gXYZ` and `bXYZ`.
    """
    kind = 0 if len(curve) == 1 else 3
    tone = b"para" + bytes(4) + struct.pack(">HH", kind, 0) + b"".join(map(fixed, curve))
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642) + fixed(1) + fixed(0.8249)}
    for tag, numbers in columns.items():
        tags[tag] = b"XYZ " + bytes(4) + b"".join(fixed(number) for number in numbers)
    for tag in (b"kTRC",) if space == b"GRAY" else (b"rTRC", b"gTRC", b"bTRC"):
        tags[tag] = tone
    text = b"odd\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text
    tags[b"desc"] = description.ljust(104, b"\0")

    table = struct.pack(">I", len(tags))
    data = b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, b"mntr", space, b"XYZ "
    )
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += fixed(0.9642) + fixed(1) + fixed(0.8249)
    return header.ljust(128, b"\0") + table + data


def display_p3() -> bytes:
    """Return a profile with the primaries of Display P3."""
    columns = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    return profile(b"RGB ", SRGB_CURVE, columns)


def long_profile() -> bytes:
    """Return an sRGB profile of 2 MiB, which ends with zeros."""
    short = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    size = 2 * 2**20
    return struct.pack(">I", size) + short[4:].ljust(size - 4, b"\0")


def plain_png(lines: np.ndarray, bits: int, clear: tuple[int, ...] = ()) -> bytes:
    """Return a PNG of a kind that Pillow does not write.

    Args:
        lines: packed samples, (H, ...); of 16 bits if they are uint16.
        bits: of a sample. The picture is grey, with an alpha or RGB by the channels of `lines`.
        clear: the transparent colour.
    """
    data = lines.astype(lines.dtype.newbyteorder(">"))
    channels = 1 if lines.ndim == 2 else lines.shape[2]
    width = lines.shape[1] * lines.itemsize * 8 // bits
    header = struct.pack(">IIBBBBB", width, len(lines), bits, {1: 0, 2: 4, 3: 2}[channels], 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(f">{len(clear)}H", *clear)}
    chunks[b"IDAT"] = zlib.compress(b"".join(b"\0" + line.tobytes() for line in data))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in {**chunks, b"IEND": b""}.items():
        if content or name == b"IEND":
            crc = zlib.crc32(name + content)
            parts.append(struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc))
    return b"".join(parts)


def with_chunks(pixels: np.ndarray, **chunks: tuple[int, ...]) -> bytes:
    """Return a PNG with chunks of whole numbers."""
    data = encoded(pixels, "PNG")
    end_of_header = 33
    added = b""
    for name, numbers in chunks.items():
        content = name.encode() + struct.pack(f">{len(numbers)}I", *numbers)
        added += struct.pack(">I", len(content) - 4) + content
        added += struct.pack(">I", zlib.crc32(content))
    return data[:end_of_header] + added + data[end_of_header:]


def with_hidden_corner(pixels: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Return a picture with a transparent corner of another colour, and what it shows on white."""
    alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    alpha[:4, :4] = 0
    hidden = pixels.copy()
    hidden[:4, :4] = HIDDEN
    shows = pixels.copy()
    shows[:4, :4] = 255
    image = Image.fromarray(hidden)
    image.putalpha(Image.fromarray(alpha))
    return image, shows


def readable_images() -> list[OddImage]:
    """Return files that every reader converts."""
    picture = quadrants()
    grey = ramp()
    wide = grey.astype(np.uint16) * 257
    images = []

    # Orientations, and EXIF blocks that cannot be written back or read.
    for number in range(1, 9):
        stored = turned(picture, number)
        block = exif_block(orientation(number))
        data = encoded(stored, "JPEG", exif=block, quality=100, subsampling=0)
        images.append(OddImage(f"turned{number}.jpg", data, picture, 4))
    stored = turned(picture, 6)
    odd_entries = {
        "byte": (296, 1, b"\2\0\0\0"),
        "signed": (283, 8, struct.pack("<hh", -3, 0)),
        "text": (256, 2, b"abc\0"),
    }
    for name, entry in odd_entries.items():
        block = exif_block(orientation(6), entry)
        images.append(OddImage(f"exif_{name}.png", encoded(stored, "PNG", exif=block), picture))
    images += [
        OddImage("turned.tif", encoded(stored, "TIFF", tiffinfo={274: 6}), picture),
        OddImage("exif_garbage.png", encoded(picture, "PNG", exif=b"Exif\0\0nonsense"), picture),
    ]

    # Palettes, 1 bit, 16 bits, CMYK.
    palette = Image.fromarray(grey // 17, "P")
    palette.putpalette([value for i in range(16) for value in (i * 17, 0, 0)])
    red = np.stack([grey, 0 * grey, 0 * grey], axis=2)
    transparent_red = red.copy()
    transparent_red[:, 0] = 255
    inverse = {"tiffinfo": {262: 0}}
    images += [
        OddImage("palette.png", encoded(palette, "PNG"), red),
        OddImage("palette.gif", encoded(palette, "GIF"), red),
        OddImage("palette_clear.png", encoded(palette, "PNG", transparency=0), transparent_red),
        OddImage("one_bit.png", encoded(grey > 100, "PNG"), rgb((grey > 100) * 255)),
        OddImage("one_bit.tif", encoded(grey > 100, "TIFF"), rgb((grey > 100) * 255)),
        OddImage("wide.png", encoded(wide, "PNG"), rgb(grey)),
        OddImage("wide_little.tif", encoded(wide, "TIFF"), rgb(grey)),
        OddImage("wide_big.tif", encoded(wide.astype(">u2"), "TIFF"), rgb(grey)),
        OddImage("wide_inverse.tif", encoded(wide, "TIFF", **inverse), rgb(255 - grey)),
        OddImage("wide_clear.png", encoded(wide, "PNG", transparency=65535), rgb(grey)),
        OddImage("wide_rgb.png", plain_png(picture.astype(np.uint16) * 257, 16), picture),
        OddImage(
            "twelve.pgm",
            b"P5 16 16 4095\n" + (wide >> 4).astype(">u2").tobytes(),
            rgb(grey),
        ),
        OddImage("cmyk.tif", encoded(Image.fromarray(picture).convert("CMYK"), "TIFF"), picture),
        OddImage(
            "cmyk.jpg",
            encoded(Image.fromarray(rgb(grey)).convert("CMYK"), "JPEG", quality=100),
            rgb(grey),
            4,
        ),
    ]

    # Transparency.
    hidden, shows = with_hidden_corner(picture)
    grey_hidden, grey_shows = with_hidden_corner(rgb(grey))
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), grey_hidden.getchannel("A")])
    nibbles = grey // 17
    of_4_bits = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    pairs = nibbles // 4
    of_2_bits = pairs[:, ::4] << 6 | pairs[:, 1::4] << 4 | pairs[:, 2::4] << 2 | pairs[:, 3::4]
    alpha = np.asarray(grey_hidden.getchannel("A"), dtype=np.uint16)
    half = Image.fromarray(rgb(grey))
    half.putalpha(Image.new("L", half.size, 128))
    images += [
        OddImage("hidden.png", encoded(hidden, "PNG"), shows),
        OddImage("hidden.tif", encoded(hidden, "TIFF"), shows),
        OddImage("hidden.webp", encoded(hidden, "WEBP", lossless=True, exact=True), shows),
        OddImage("hidden.tga", encoded(hidden, "TGA"), shows),
        OddImage("grey_alpha.png", encoded(grey_alpha, "PNG"), grey_shows),
        OddImage(
            "wide_alpha.png", plain_png(np.stack([wide, alpha * 257], axis=2), 16), grey_shows
        ),
        OddImage(
            "clear_4_bits.png",
            plain_png(of_4_bits, 4, clear=(5,)),
            rgb(np.where(nibbles == 5, 255, grey)),
        ),
        OddImage(
            "clear_2_bits.png",
            plain_png(of_2_bits, 2, clear=(1,)),
            rgb(np.where(pairs == 1, 255, pairs * 85)),
        ),
        OddImage(
            "clear_wide_rgb.png",
            plain_png(
                picture.astype(np.uint16) * 256 + 7, 16, tuple(c * 256 + 7 for c in COLOURS[0])
            ),
            np.where(picture == COLOURS[0], 255, picture).astype(np.uint8),
        ),
        OddImage(
            "half.png", encoded(half, "PNG"), rgb(255 - (255 - grey.astype(int)) * 128 // 255)
        ),
        OddImage(
            "clear_colour.png",
            encoded(picture, "PNG", transparency=COLOURS[0]),
            np.where(picture == COLOURS[0], 255, picture).astype(np.uint8),
        ),
    ]

    # Colour profiles.
    flat = np.full((SIZE, SIZE, 3), RED_P3, dtype=np.uint8)
    flat_alpha = Image.fromarray(flat)
    flat_alpha.putalpha(255)
    converted = np.full((SIZE, SIZE, 3), RED_SRGB, dtype=np.uint8)
    linear = profile(b"GRAY", (1.0,), {})
    level = np.full((SIZE, SIZE), 55, dtype=np.uint8)  # .216 of the light, which is 127 in sRGB
    p3 = display_p3()
    images += [
        OddImage("p3.png", encoded(flat, "PNG", icc_profile=p3), converted),
        OddImage("p3.jpg", encoded(flat, "JPEG", icc_profile=p3, quality=100), converted, 6),
        OddImage("p3_alpha.png", encoded(flat_alpha, "PNG", icc_profile=p3), converted),
        OddImage(
            "linear.png",
            encoded(level, "PNG", icc_profile=linear),
            rgb(np.full_like(level, 127)),
            2,
        ),
        OddImage("no_gamma.png", with_chunks(picture, gAMA=(0,), cHRM=(0,) * 8), picture),
        OddImage("gamma.png", with_chunks(level, gAMA=(100000,)), rgb(np.full_like(level, 127)), 2),
        OddImage(
            "p3_chunks.png", with_chunks(flat, gAMA=(45455,), cHRM=P3_CHROMATICITIES), converted, 6
        ),
        OddImage(
            "gamma_of_srgb.png",
            with_chunks(picture, gAMA=(45455,), cHRM=SRGB_CHROMATICITIES),
            picture,
        ),
        OddImage("long_profile.png", encoded(picture, "PNG", icc_profile=long_profile()), picture),
        OddImage(
            "damaged_profile.png", encoded(picture, "PNG", icc_profile=b"no profile"), picture
        ),
        OddImage("grey_p3.jpg", encoded(grey, "JPEG", icc_profile=p3, quality=100), rgb(grey), 3),
    ]

    # Long texts, several frames, other suffixes.
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (2 * 2**20), zip=True)
    second = [Image.fromarray(255 - picture)]
    frames = {"save_all": True, "append_images": second}
    lossless = {**frames, "lossless": True}
    few = Image.fromarray(picture).quantize(4)
    images += [
        OddImage("long_text.png", encoded(picture, "PNG", pnginfo=text), picture),
        OddImage("frames.gif", encoded(few, "GIF", **frames), picture),
        OddImage("frames.webp", encoded(picture, "WEBP", **lossless), picture),
        OddImage("frames.png", encoded(picture, "PNG", **frames), picture),
        OddImage("pages.tif", encoded(picture, "TIFF", **frames), picture),
        OddImage("photo.jfif", encoded(picture, "JPEG", quality=100, subsampling=0), picture, 4),
        OddImage("photo.jp2", encoded(picture, "JPEG2000", irreversible=False), picture),
        OddImage("photo.PPM", encoded(picture, "PPM"), picture),
        OddImage("png_in.jpg", encoded(picture, "PNG"), picture),
    ]
    return images


class UnclearImage(NamedTuple):
    """A file that is refused, and how it is read once the value of white is given."""

    name: str
    data: bytes
    named: tuple[str, ...]  # in the refusal
    white: float | None  # with which it is read
    shows: np.ndarray | None


def unclear_images() -> list[UnclearImage]:
    """Return files that every reader refuses, for the same reason."""
    grey = ramp()
    twelve = (grey.astype(np.uint16) * 257) >> 4
    shows = rgb(grey)
    photo = encoded(quadrants(), "JPEG")
    dark = plain_png(np.full((SIZE, SIZE, 3), 300, dtype=np.uint16), 16)
    signed = (grey.astype(np.int32) * 257 - 32768).astype(np.int32)
    fraction = grey.astype(np.float32) / 255
    broken = fraction.copy()
    broken[3, 3] = np.nan
    return [
        UnclearImage("twelve.png", encoded(twelve, "PNG"), ("4095", "65535"), 4095, shows),
        UnclearImage("twelve.tif", encoded(twelve, "TIFF"), ("4095", "65535"), 4095, shows),
        UnclearImage("int32.tif", encoded(grey.astype(np.int32), "TIFF"), ("255",), 255, shows),
        UnclearImage("float.tif", encoded(fraction, "TIFF"), ("0 to 1", "white"), 1, shows),
        UnclearImage("signed.tif", encoded(signed, "TIFF"), ("-32768", "32767"), None, None),
        UnclearImage("nan.tif", encoded(broken, "TIFF"), ("not finite",), None, None),
        UnclearImage("dark_rgb.png", dark, ("16 bits", "65535"), 65535, np.ones_like(shows)),
        UnclearImage("cut.jpg", photo[:-20], ("truncated",), None, None),
        UnclearImage("text.jpg", b"no image", ("not an image",), None, None),
    ]
