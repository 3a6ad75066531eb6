"""A photo of a garment becomes an image as in Fashion-MNIST: 28x28 pixels, light on black.

fashion-mnist.py classifies photos with it: `open_photo` reads a file, `find_garment` cuts the
garment out of its background with OpenCV's GrabCut, and `prepare` makes the image, after section 2
of Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747). A photo that doesn't show one whole garment is
refused. `show_image` prints what the network then sees.
"""

import stat
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

LARGEST = 100_000_000  # pixels of a file
PHOTO_SIDE = 224  # pixels, enough to cut out a garment
SMALLEST = 0.004  # share of a photo that a garment must cover
LIGHT = 170  # gray value above which a garment, inverted, would be mostly noise


def check_header(path: Path) -> None:
    """Raise ValueError unless `path` is a file that holds a whole picture of a size to work with.

    It reads no pixels; of a PNG, it compares the checksums, which decoding skips.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
        raise ValueError("not a file")
    try:
        with Image.open(path) as file:
            width, height = file.size
            if width * height <= LARGEST:
                file.verify()
    except Image.DecompressionBombError:
        width = height = LARGEST
    except UnidentifiedImageError:
        raise ValueError("a broken file, or no format for this; save it as JPEG") from None
    if width * height > LARGEST:
        raise ValueError(f"more than {LARGEST // 10**6} megapixels; make it smaller")
    if min(width, height) < 28:
        raise ValueError("too small: a photo has at least 28 pixels on each side")


def open_photo(path: Path) -> Image.Image:
    """Read a photo: upright, RGBA, 8 bits per channel, at most a few times `PHOTO_SIDE` pixels.

    Raises OSError or ValueError, among others, if the file isn't a photo.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about sizes and metadata
        check_header(path)
        with Image.open(path) as file:
            size = (4 * PHOTO_SIDE, 4 * PHOTO_SIDE)
            file.thumbnail(size, Image.Resampling.NEAREST)  # makes no copy of the original's size
            try:
                image: Image.Image = ImageOps.exif_transpose(file)
            except Exception:  # EXIF that nobody can read fails in many ways, and tells nothing
                image = file.copy()
    if image.mode in ("I", "F"):  # whose range may be anything
        raise ValueError("32 bits per pixel and channel are too many; 16 are not")
    if image.mode.startswith("I;16"):  # in either byte order
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA")


def frame_depth(pixels: np.ndarray) -> int:
    """Return how many rows at the top (H, W, 3) are a frame: one color up to a straight step."""
    top = pixels[: len(pixels) // 2].astype(int)
    steps = np.abs(top[2:] - top[:-2]).max(axis=-1) > 24
    for row in np.flatnonzero(steps.mean(axis=1) > 0.95)[::-1]:
        frame = top[: row + 1]
        if (np.abs(frame - np.median(frame, axis=(0, 1))).max(axis=-1) < 10).mean() > 0.85:
            return int(row) + 2
    return 0


def trim_frame(pixels: np.ndarray) -> np.ndarray:
    """Cut a frame, or bars, off the pixels (H, W, 3) of a photo."""
    for _ in range(4):
        pixels = np.rot90(pixels[frame_depth(pixels) :])
    return np.ascontiguousarray(pixels)


def check_edges(pixels: np.ndarray) -> None:
    """Raise ValueError if the edge of a photo, without its grain, shows more than background."""
    for _ in range(4):
        pixels = np.rot90(pixels)
        line = cv2.medianBlur(np.ascontiguousarray(pixels[:1]), 21)[0].astype(int)
        if np.abs(line[6:] - line[:-6]).max(initial=0) > 48:  # a shadow changes more slowly
            raise ValueError("something reaches the edge of the photo; leave a margin around it")


def suggest_background(pixels: np.ndarray) -> np.ndarray:
    """Return the smooth background (H, W, 3) that the border of a photo suggests."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    inside = np.pad(np.ones((28, 28), dtype=np.uint8), 2)
    return cv2.resize(cv2.inpaint(small, inside, 3, cv2.INPAINT_TELEA), (width, height))


def find_garment(pixels: np.ndarray) -> np.ndarray:
    """Return where the garment is, (H, W) bool, in a photo's pixels (H, W, 3) uint8.

    GrabCut (Rother, Kolmogorov and Blake 2004) cuts out what differs from the border. Raises
    ValueError if there is nothing but background, or not one garment.
    """
    height, width = pixels.shape[:2]
    edge = max(1, min(height, width) // 20)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    background = suggest_background(pixels)
    mask = np.full((height, width), cv2.GC_PR_BGD, dtype=np.uint8)
    for view in (pixels, cv2.GaussianBlur(pixels, (0, 0), 5)):  # wood has no grain when blurred
        off = cv2.absdiff(view, background)
        mask[(off > 3 * (off[border].mean(axis=0) + 8)).any(axis=-1)] = cv2.GC_PR_FGD
    mask[border] = cv2.GC_BGD
    if (mask == cv2.GC_PR_FGD).mean() > SMALLEST:
        cv2.setRNGSeed(0)  # GrabCut is random; the same photo should give the same image
        colors = np.zeros((1, 65))  # GrabCut fills it
        cv2.grabCut(pixels, mask, (0, 0, 1, 1), colors, colors.copy(), 5, cv2.GC_INIT_WITH_MASK)
    _, parts, stats, _ = cv2.connectedComponentsWithStats((mask == cv2.GC_PR_FGD).astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    if areas.max() < SMALLEST * mask.size:
        raise ValueError("nothing but background, or a garment that is too much like it")
    check_parts(stats[areas > areas.max() / 5])
    garment = (areas > areas.max() / 20)[parts]
    y, x = np.nonzero(garment)
    box = (np.ptp(y) + 1) * (np.ptp(x) + 1)
    if box > garment.size / 2 and garment.sum() > 0.97 * box:
        raise ValueError("a picture in a frame; cut the frame off")
    return garment


def check_parts(stats: np.ndarray) -> None:
    """Raise ValueError if large parts of a garment, rows of OpenCV's statistics, lie apart."""
    start = stats[:, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]]
    end = start + stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
    if (start.max(axis=0) - end.min(axis=0)).max() > PHOTO_SIDE / 20:  # straps may lie closer
        raise ValueError("more than one garment; take a photo of each")


def is_ready(pixels: np.ndarray) -> bool:
    """Say whether RGBA pixels (H, W, 4) are an image of the data set: 28x28, gray, on black."""
    if pixels.shape[:2] != (28, 28):
        return False
    gray = (pixels[..., :3] == pixels[..., :1]).all() and (pixels[..., 3] == 255).all()
    return bool(gray and pixels[::27, ::27, 0].min() == 0 and pixels[..., 0].max() > 60)


def cut_out(photo: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return an RGBA photo's garment, gray and light (H, W), and where it is, (H, W) bool.

    Where a photo is transparent is its background. The garment is inverted, as in the data set,
    unless it is light, and lighter than its background. Raises ValueError if the photo doesn't show
    one whole garment.
    """
    opaque = np.asarray(photo.getchannel("A")) >= 128
    on_white = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    pixels = cv2.bilateralFilter(np.asarray(on_white), 5, 30, 3)  # removes noise, keeps edges
    transparent = opaque.mean() < 0.98  # less may be round corners
    if not transparent:
        pixels = trim_frame(pixels)
        check_edges(pixels)
    garment = opaque if transparent else find_garment(pixels)
    if garment.mean() < SMALLEST:
        raise ValueError("nothing but background")
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)
    background = LIGHT if transparent else np.median(gray[~garment])
    if background > 60:  # on black, a photo already looks like the data set
        background = max(background, LIGHT)
    if np.median(gray[garment]) <= background:
        gray = 255 - gray
    return gray, garment


def prepare(photo: Image.Image) -> Tensor:
    """Turn a photo of a garment into an image as in the data set: uint8 (28, 28), light on black.

    It is cut out, straightened, cropped, and scaled to 28 pixels on the longer side. An image of
    the data set stays as it is. Raises ValueError if the photo doesn't show one whole garment.
    """
    photo = photo.convert("RGBA")
    if is_ready(np.asarray(photo)):
        return torch.from_numpy(np.array(photo.convert("L")))
    scale = PHOTO_SIDE / max(photo.size)
    photo = photo.resize((max(8, round(scale * photo.width)), max(8, round(scale * photo.height))))
    gray, garment = cut_out(photo)
    gray *= 255 / max(1, np.percentile(gray[garment], 99))
    image = Image.fromarray((gray * garment).clip(0, 255).astype(np.uint8))
    tilt = (cv2.minAreaRect(cv2.findNonZero(garment.astype(np.uint8)))[2] + 45) % 90 - 45
    if abs(tilt) <= 12:  # a larger tilt may be its shape
        image = image.rotate(tilt, Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.point(lambda value: 255 * (value > 8)).getbbox())
    return torch.from_numpy(np.array(ImageOps.pad(image, (28, 28), Image.Resampling.BOX)))


def show_image(image: Tensor) -> None:
    """Print an image (28, 28), each character two pixels, in the 24 grays of a terminal."""
    for rows in (232 + image.long() * 24 // 256).view(14, 2, 28).tolist():
        pixels = (f"\x1b[38;5;{top};48;5;{bottom}m▀" for top, bottom in zip(*rows, strict=True))
        print("".join(pixels) + "\x1b[0m")
