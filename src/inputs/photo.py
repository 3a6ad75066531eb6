"""A photo of a garment becomes an image as in Fashion-MNIST: 28x28 pixels, light on black.

fashion-mnist.py classifies photos with it. OpenCV's GrabCut cuts the garment out of its background;
the rest follows section 2 of Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747). `show_image` prints
what the network then sees.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PHOTO_SIDE = 224  # pixels, enough to cut out a garment
SMALLEST = 0.004  # share of a photo that a garment must cover


def open_photo(path: Path) -> Image.Image:
    """Read a photo: upright, RGB, on white if transparent, its longer side `PHOTO_SIDE` pixels."""
    with Image.open(path) as file:
        size = (4 * PHOTO_SIDE, 4 * PHOTO_SIDE)
        file.thumbnail(size, Image.Resampling.NEAREST)  # makes no copy of the original's size
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode in ("I", "F"):  # whose range may be anything
        raise ValueError("32 bits per pixel and channel are too many; 16 are not")
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = PHOTO_SIDE / max(image.size)
    return image.resize((max(8, round(scale * image.width)), max(8, round(scale * image.height))))


def find_garment(pixels: np.ndarray) -> np.ndarray:
    """Return where the garment is, (H, W) bool, in a photo's pixels (H, W, 3) uint8.

    GrabCut (Rother, Kolmogorov and Blake 2004) cuts out what differs from the border. Raises
    ValueError if there is nothing but background.
    """
    height, width = pixels.shape[:2]
    edge = max(1, min(height, width) // 20)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    inside = np.pad(np.ones((28, 28), dtype=np.uint8), 2)
    table = cv2.resize(cv2.inpaint(small, inside, 3, cv2.INPAINT_TELEA), (width, height))
    off = cv2.absdiff(pixels, table)  # from the background that the border suggests
    differs = (off > 3 * (off[border].mean(axis=0) + 8)).any(axis=-1)
    mask = np.where(differs, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[border] = cv2.GC_BGD
    if (mask == cv2.GC_PR_FGD).mean() > SMALLEST:
        cv2.setRNGSeed(0)  # GrabCut is random; the same photo should give the same image
        colors = np.zeros((1, 65))  # GrabCut fills it
        cv2.grabCut(pixels, mask, (0, 0, 1, 1), colors, colors.copy(), 5, cv2.GC_INIT_WITH_MASK)
    _, parts, stats, _ = cv2.connectedComponentsWithStats((mask == cv2.GC_PR_FGD).astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    if areas.max() < SMALLEST * mask.size:
        raise ValueError("nothing but background")
    return (areas > areas.max() / 20)[parts]


def prepare(photo: Image.Image) -> Tensor:
    """Turn a photo of a garment into an image as in the data set: uint8 (28, 28), light on black.

    It is inverted unless its background is dark, straightened, cropped, and scaled to 28 pixels on
    the longer side. Raises ValueError if there is nothing but background.
    """
    pixels = cv2.bilateralFilter(np.asarray(photo), 5, 30, 3)  # removes noise, keeps edges
    garment = find_garment(pixels)
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)
    if np.median(gray[~garment]) > 60:  # on black, a photo already looks like the data set
        gray = 255 - gray
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
