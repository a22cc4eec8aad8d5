"""Images of any file as one kind of pixels: upright, 8 bits, grey or RGB in sRGB, opaque.

Every reader of images converts them here: `rectify pack`, indexed sets and sequential tars.
"""

import logging
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, PngImagePlugin, TiffImagePlugin
from PIL.ExifTags import Base as ExifTag

from data.files import is_machine_fault

log = logging.getLogger(__name__)

# Formats that are not read: EPS runs Ghostscript, FITS has scales that Pillow ignores, some have no
# signature, and of the others Pillow reads the header alone.
EXCLUDED_FORMATS = {"EPS", "FITS", "IM", "IPTC", "PCD", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON_FIELDS = ("png", "jpg", "jpeg", "webp")  # of images in tars


def find_suffixes() -> dict[str, str]:
    """Return the suffixes of image files that this Pillow reads, and the format of each."""
    Image.init()
    suffixes = {".mpo": "JPEG"}  # which opens it
    for suffix, name in Image.registered_extensions().items():
        if name in Image.OPEN and name not in EXCLUDED_FORMATS:
            suffixes[suffix] = name
    return suffixes


IMAGE_SUFFIXES = find_suffixes()
OTHER_FIELDS = sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - set(COMMON_FIELDS))
IMAGE_FIELDS = (*COMMON_FIELDS, *OTHER_FIELDS)  # of a tar's sample that hold an image
# Formats by which a file without a suffix is recognised; the signatures of others are too short.
SNIFFED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000")
SNIFFED_BYTES = 16

# Pillow's limits of 1 MiB and 64 MiB refuse PNG with long profiles, histories or workflows.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by a profile's space
# Modes whose colours are converted first: multiplied by alpha, or in CIELAB.
PLAIN_MODES = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}
WHITES = (1, 255, 1023, 4095, 16383, 32767, 65535, 2**32 - 1)  # usual values of white
DARK = 2**14  # 16-bit images that stay below it are more likely of 14 bits or less
MAX_PROFILE_ERROR = 1  # levels of 255 by which a profile may differ from sRGB and count as sRGB
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
SIGNED = 2  # TIFF's SampleFormat
FEW_BITS = {"L;2": 85, "L;4": 17}  # factors to 8 bits of grey PNG of 2 and 4 bits


class PixelOptions(NamedTuple):
    """How images become pixels."""

    grey: bool = False  # one channel instead of three
    background: str = "white"  # the colour on which transparent images are laid
    white: float | None = None  # the value of white in images of more than 8 bits, if not declared


def check_pixel_options(options: PixelOptions) -> None:
    """Check the options.

    Raises:
        ValueError: the background is no colour, or white is not positive.
    """
    try:
        ImageColor.getrgb(options.background)
    except ValueError:
        raise ValueError(
            f"background is {options.background!r}; it must be a colour such as white or #808080"
        ) from None
    if options.white is not None and not 0 < options.white < float("inf"):
        raise ValueError(f"white is {options.white}; it must be a positive number")


@lru_cache
def formats_of(suffix: str) -> tuple[str, ...]:
    """Return the formats that a file may have: those with a signature, and that of its suffix.

    They are tried in this order, that of the suffix first if it has a signature.
    """
    formats = []
    for name in sorted(set(IMAGE_SUFFIXES.values())):
        _, accept = Image.OPEN[name]
        if accept:
            formats.append(name)
    by_suffix = IMAGE_SUFFIXES.get(suffix.lower())
    if by_suffix in formats:
        formats.remove(by_suffix)
        formats.insert(0, by_suffix)
    elif by_suffix:
        formats.append(by_suffix)
    return tuple(formats)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix, or by its first bytes if it has no suffix."""
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    with path.open("rb") as file:
        prefix = file.read(SNIFFED_BYTES)
    for name in SNIFFED_FORMATS:
        _, accept = Image.OPEN.get(name, (None, None))
        if accept and accept(prefix) is True:
            return True
    return False


def open_image(file: Path | IO[bytes], suffix: str) -> Image.Image:
    """Open an image, whatever its suffix says; of an animation, its first frame.

    Args:
        file: the file, or its bytes.
        suffix: of its name, for formats without a signature.

    Raises:
        ValueError: it is no image.
    """
    try:
        return Image.open(file, formats=formats_of(suffix))
    except Image.UnidentifiedImageError:  # its message has the address of an object
        raise ValueError("not an image that Pillow reads, or damaged in its first bytes") from None


def convert_image(image: Image.Image, options: PixelOptions, name: str) -> Image.Image:
    """Return an image upright, opaque, in sRGB, of 8 bits, grey or RGB.

    Args:
        image: as it was opened; not loaded, because its file then no longer shows its bits.
        options: how it becomes pixels.
        name: of the image, for the log.

    Raises:
        ValueError: which of its values is white is not known.
    """
    # Make 8 bits of each channel, and turn it.
    bits = describe_bits(image)
    scale_transparency(image)
    image.load()
    orientation = read_orientation(image, name)
    marks = image.info
    profile = marks.get("icc_profile")
    gamma = marks.get("gamma")  # of PNG
    if image.mode == "LAB":
        profile = None  # its colours do not depend on a device
    if image.mode.startswith(("I", "F")):
        image = reduce_bits(image, bits, options.white)
    elif bits.sixteen:
        check_brightness(image, options.white)
    if image.mode in PLAIN_MODES:
        image = image.convert(PLAIN_MODES[image.mode])
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])

    # Convert its colours to sRGB, and lay it on the background.
    alpha = read_alpha(image)
    if profile:
        image = convert_profile(image, profile, name)
    elif gamma and "srgb" not in marks:
        image = convert_gamma(image, gamma, marks.get("chromaticity", SRGB_PRIMARIES), name)
    if alpha:
        colour = ImageColor.getrgb(options.background)[:3]
        ground = Image.new("RGB", image.size, colour)
        image = Image.composite(image.convert("RGBA").convert("RGB"), ground, alpha)
    mode = "L" if options.grey else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return the pixels of a converted image as uint8, (C, H, W)."""
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


class Bits(NamedTuple):
    """What a file says of its samples, in 8 or more bits."""

    sixteen: bool  # 16 bits, of which Pillow keeps the upper 8 if there are several channels
    white: int | None  # the value of white, if the file declares one
    inverted: bool  # 0 is white, and Pillow did not see to it


def describe_bits(image: Image.Image) -> Bits:
    """Return what the file of an image says of its samples.

    Raises:
        ValueError: they are signed, which Pillow would read as unsigned.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return Bits(sixteen=False, white=None, inverted=False)
    modes = " ".join(str(tile.args) for tile in image.tile)
    sixteen = ";16" in modes and "BGR;16" not in modes  # these are 16 bits of a whole pixel
    if image.format == "PPM" and image.mode == "I":
        return Bits(sixteen, 65535, inverted=False)  # Pillow scales by the file's largest value
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return Bits(sixteen, None, inverted=False)

    tags = image.tag_v2
    if image.mode == "L" and SIGNED in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise ValueError("8 bits with a sign, of which Pillow reads none; convert it to unsigned")
    white = None
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        white = 4095
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    inverted = photometric == WHITE_IS_ZERO and image.mode.startswith(("I", "F"))
    return Bits(sixteen, white, inverted)


def scale_transparency(image: Image.Image) -> None:
    """Give the transparent colour of a PNG, which has its file's bits, the 8 bits of its pixels.

    Of 16 bits in each channel the upper 8 are compared, because Pillow has no others.
    """
    colour = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or colour is None or not image.tile:
        return
    stored = image.tile[0].args
    if stored in FEW_BITS:
        image.info["transparency"] = colour * FEW_BITS[stored]
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def reduce_bits(image: Image.Image, bits: Bits, white: float | None) -> Image.Image:
    """Return an image of one channel of 16 or 32 bits in 8 bits, with its alpha if it has any.

    Args:
        image: of mode I, I;16, I;16B or F.
        bits: what its file says of them.
        white: the value of white if the file does not say it; None: 65535 for 16 bits.

    Raises:
        ValueError: the value of white is not known, or others are outside 0 .. white.
    """
    # Find the value of white.
    values = np.asarray(image)
    kind = values.dtype.newbyteorder("=").name
    low = values.min().item()
    high = values.max().item()
    has = f"{kind} values from {low:.9g} to {high:.9g}"
    if not np.isfinite(values).all():
        raise ValueError(f"has {kind} values that are not finite; repair it")
    white = bits.white or white
    if white is None and (kind == "uint16" or image.format == "PNG"):
        white = 65535
        if 0 < high < DARK:
            raise ValueError(
                f"has {has} of 65535: if it is as dark as this set `white` to 65535, otherwise "
                f"to its value of white, {suggest_white(high)}"
            )
    if white is None and low == high == 0:
        white = 1  # black, whatever white is
    if white is None and low >= 0:
        raise ValueError(
            f"has {has}, and its file does not say which is white; set `white`, "
            f"for example to {suggest_white(high)}"
        )
    if white is None or low < 0:
        raise ValueError(f"has {has}; convert it to 8 bits, in which 0 is black")
    if 0 < high < white / 255:
        raise ValueError(
            f"has {has}, all black if `white` is {white:g}; convert the image to 8 bits"
        )
    if high > white:
        raise ValueError(
            f"has {has}, above `white`, which is {white:g}; set it to {suggest_white(high)}, or "
            "convert the image to 8 bits"
        )

    # Scale the values.
    if bits.inverted:
        values = white - values
    levels = np.rint(values * (255 / white))
    if white == 65535:
        levels = values.astype(np.int64) >> 8
    reduced = Image.fromarray(levels.astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)
        reduced = Image.merge("LA", [reduced, Image.fromarray(alpha)])
    return reduced


def suggest_white(high: float) -> str:
    """Return the usual value of white for values of which the largest is `high`."""
    for white in WHITES:
        if high <= white:
            return str(white)
    return f"{high:.9g}"


def check_brightness(image: Image.Image, white: float | None) -> None:
    """Check that 16 bits, of which Pillow kept the upper 8, were 16 bits and not fewer.

    Raises:
        ValueError: they were fewer.
    """
    if white == 65535:
        return
    if white is not None:
        raise ValueError(
            f"has 16 bits in each of {len(image.getbands())} channels, which `white` "
            f"({white:g}) cannot scale; convert it to 8 bits"
        )
    colours = [name for name in image.getbands() if name != "A"]
    high = max(np.asarray(image.getchannel(name)).max().item() for name in colours)
    if 0 < high < DARK >> 8:
        raise ValueError(
            f"has 16 bits in each channel but values below {(high + 1) << 8}: if it is as dark as "
            "this set `white` to 65535, otherwise convert it to 8 bits"
        )


def read_orientation(image: Image.Image, name: str) -> int:
    """Return the orientation in an image's EXIF or XMP, 1 to 8; 1 if it has none."""
    try:
        # The base method: that of PNG decodes the image.
        exif = Image.Image.getexif(image)
        orientation = exif.get(ExifTag.Orientation, 1)
    except Exception as error:  # as many kinds as ways in which a block can be damaged
        if is_machine_fault(error):
            raise
        report_once(f"{name}: its EXIF block is damaged ({error}); it is not turned")
        return 1
    if orientation in UPRIGHT:
        return int(orientation)
    return 1


def read_alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha of an image of 8 bits; None if it is opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        return None
    return alpha


def convert_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """Return the colours of an image in sRGB, without alpha; the image itself if they are."""
    # Find the mode in which the profile describes the image.
    modes = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}
    mode = modes.get(image.mode, "RGB")
    found = profile_mode(profile)
    if mode == "L" and found == "RGB":
        mode = "RGB"
    if mode != found:
        report_once(f"{name}: its colour profile is damaged or of other channels; it is not used")
        return image

    # Convert them, if it is not sRGB anyway.
    transform = srgb_transform(profile, mode)
    if transform is None:
        return image
    colours = ImageCms.applyTransform(image.convert(mode), transform)
    assert colours is not None
    colours.info.clear()
    return colours


def convert_gamma(
    image: Image.Image, gamma: float, primaries: tuple[float, ...], name: str
) -> Image.Image:
    """Return the colours of a PNG without a profile in sRGB, without alpha.

    Args:
        image: grey, RGB or a palette.
        gamma: exponent with which light was stored, 1 / 2.2 for about sRGB.
        primaries: x and y of white, red, green and blue.
        name: of the image, for the log.
    """
    near = np.abs(np.subtract(primaries, SRGB_PRIMARIES)).max() < 0.001
    if near and abs(gamma - 1 / 2.2) < 0.01:
        return image
    try:
        with np.errstate(all="raise"):
            change = np.linalg.inv(light_of(SRGB_PRIMARIES)) @ light_of(primaries)
    except (FloatingPointError, np.linalg.LinAlgError):
        gamma = 0.0
    if not 0.1 < gamma < 10:
        report_once(f"{name}: its gAMA or cHRM is no colour space; it is not used")
        return image
    light = (np.asarray(image.convert("RGB")) / 255) ** (1 / gamma)
    if not near:
        light = (light @ change.T).clip(0, 1)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def light_of(primaries: tuple[float, ...]) -> np.ndarray:
    """Return the matrix from RGB to XYZ, (3, 3), of x and y of white, red, green and blue."""
    x, y = np.reshape(primaries, (4, 2)).T
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    matrix = np.stack(colours, axis=1)
    return matrix * np.linalg.solve(matrix, white)


@lru_cache(maxsize=64)
def profile_mode(profile: bytes) -> str | None:
    """Return the mode of the images that a profile describes; None if it is damaged."""
    try:
        space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space
        mode = PROFILE_MODES.get(space)
        if mode:
            srgb_transform(profile, mode)
        return mode
    except (OSError, ImageCms.PyCMSError):
        return None


@lru_cache(maxsize=64)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it changes nothing."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB")
    if mode == "CMYK":
        return transform

    # Compare colours before and after.
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        colours = Image.fromarray(levels[None])
    else:
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        colours = Image.fromarray(grid.reshape(1, -1, 3))
    after = ImageCms.applyTransform(colours, transform)
    assert after is not None
    before = np.asarray(colours.convert("RGB"), dtype=np.int64)
    change = np.abs(np.asarray(after, dtype=np.int64) - before).max()
    return None if change <= MAX_PROFILE_ERROR else transform


@lru_cache(maxsize=1024)
def report_once(text: str) -> None:
    """Log a line, once for each text."""
    log.warning(text)
