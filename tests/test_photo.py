import importlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from inputs.photo import open_photo, prepare

fashion = importlib.import_module("fashion-mnist")


@pytest.fixture(scope="module")
def trained():
    """A network trained for three epochs on the sample."""
    torch.manual_seed(0)
    train = fashion.load(fashion.SAMPLE, "train")
    model = fashion.Classifier()
    for _ in fashion.fit(model, train, train, epochs=3, batch_size=200, learning_rate=3e-3):
        pass
    return model


KINDS = ("paper", "light", "shadow", "noise", "wood", "cloth", "color", "moved", "everything")


def smooth_noise(rng, size, cells):
    """Random values between 0 and 1 that change smoothly over (height, width) cells."""
    noise = cv2.resize(rng.random(cells, np.float32), size, interpolation=cv2.INTER_CUBIC)
    return noise[..., None].clip(0, 1)


def color(rng, lightness, saturation):
    """Return any hue, within these ranges."""
    hsv = np.float32([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*lightness)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def table(rng, kind, size):
    """Return paper, wood or cloth, between 0 and 1."""
    width, height = size
    if kind == "everything":
        kind = rng.choice(["paper", "wood", "cloth"])
    if kind == "wood":
        hue = rng.uniform(15, 35)
        dark, bright = (
            cv2.cvtColor(np.float32([[[hue, rng.uniform(0.2, 0.6), v]]]), cv2.COLOR_HSV2RGB)[0, 0]
            for v in np.sort(rng.uniform(0.3, 0.9) + rng.uniform(-0.12, 0.12, 2))
        )
        wide, long = int(rng.integers(15, 80)), int(rng.integers(2, 6))
        cells = (wide, long) if rng.random() < 0.5 else (long, wide)
        grain = smooth_noise(rng, size, cells)
        return dark + (bright - dark) * grain
    if kind == "cloth":
        base, contrast = color(rng, (0.3, 0.95), (0, 0.6)), rng.uniform(0.02, 0.12)
        period = rng.uniform(2, 10)
        y, x = np.mgrid[:height, :width].astype(np.float32) * 2 * np.pi / period
        weave = np.sin(x + rng.uniform(0, 6)) * np.sin(y + rng.uniform(0, 6))
        folds = smooth_noise(rng, size, (3, 3))
        return base * (1 - contrast + contrast * weave[..., None]) * (0.9 + 0.1 * folds)
    return np.broadcast_to(color(rng, (0.88, 1), (0, 0.06)), (height, width, 3))


def photo_of(rng, picture, kind):
    """Photograph a picture, with whatever the kind leaves to chance, as a JPEG of quality 50."""
    size = width, height = int(rng.integers(300, 700)), int(rng.integers(300, 700))
    background = table(rng, kind, size)
    picture = picture.astype(np.float32)
    cut = (picture > 12).astype(np.float32)
    shade = np.where(picture > 60, picture, cv2.dilate(picture, np.ones((3, 3))))  # no pale rim
    if kind in ("paper", "light", "shadow", "noise"):
        shade = picture
    scale = min(size) * rng.uniform(0.55, 0.8) / 28
    turn = rng.uniform(-10, 10) if kind in ("moved", "everything") else 0.0
    middle = np.array(size) / 2
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), turn, scale)
    free = (np.array(size) - 28 * scale) / 2
    reach = 0.8 if kind in ("moved", "everything") else 0.1
    matrix[:, 2] += middle - 13.5 + free * rng.uniform(-reach, reach, 2)
    shade = cv2.warpAffine(shade, matrix, size, flags=cv2.INTER_CUBIC).clip(0, 255)[..., None] / 255
    alpha = cv2.warpAffine(cut, matrix, size, flags=cv2.INTER_CUBIC)[..., None]
    alpha = ((alpha - 0.5) * scale / 2 + 0.5).clip(0, 1)
    dye = np.ones(3, np.float32)
    if kind in ("color", "everything"):
        dye = 1 - color(rng, (0.3, 0.9), (0.5, 1))
        dye /= dye.max()
    garment = 1 - shade * dye
    photo = background * (1 - alpha) + garment * alpha
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x / width - 0.5, y / height - 0.5
    if kind in ("light", "everything"):
        a, s = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
        photo = photo * (1 - s * (0.5 + (np.cos(a) * x + np.sin(a) * y) / 1.42))[..., None]
    if kind in ("shadow", "everything"):
        a, s = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.45)
        edge = (np.cos(a) * x + np.sin(a) * y - rng.uniform(-0.3, 0.3)) / rng.uniform(0.03, 0.15)
        photo = photo * (1 - s / (1 + np.exp(-edge)))[..., None]
    sigma = rng.uniform(4, 14) if kind in ("noise", "light", "everything") else 2
    photo = photo * 255 + sigma * rng.standard_normal(photo.shape, np.float32)
    file = io.BytesIO()
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
    return file.getvalue()


def seen(photo, folder):
    """Save a photo, and return what the network sees of it."""
    path = folder / f"photo.{'tif' if photo.mode in 'CMYK YCbCr F I' else 'png'}"
    photo.save(path)
    return prepare(open_photo(path))


def agreement(model, test, kind, count, folder):
    """Return the share of photos that are predicted as the images they were made of."""
    images, labels = test
    right = fashion.predict(model, images).argmax(dim=1) == labels
    images, labels = images[right][:count], labels[right][:count]
    generator, path = np.random.default_rng(0), folder / "photo.jpg"
    inputs, kept = [], []
    for image in images.numpy():
        path.write_bytes(photo_of(generator, image, kind))
        try:
            inputs.append(prepare(open_photo(path)))
            kept.append(True)
        except ValueError:
            kept.append(False)
    found = fashion.predict(model, torch.stack(inputs)).argmax(dim=1)
    return (found == labels[torch.tensor(kept)]).sum().item() / len(labels)


@pytest.mark.parametrize("kind", KINDS)
def test_photos_are_predicted_as_the_images_they_were_made_of(trained, tmp_path, kind):
    test = fashion.load(fashion.SAMPLE, "t10k")
    count = 20 if kind == "everything" else 10
    assert agreement(trained, test, kind, count, tmp_path) >= 0.8  # of few


@pytest.fixture(scope="module")
def trained_fully():
    debian = Path("/usr/share/datasets/fashion-mnist")
    folder = debian if debian.is_dir() else fashion.SAMPLE
    torch.manual_seed(0)
    train, validation = fashion.hold_out(fashion.load(folder, "train"))
    model = fashion.Classifier()
    for _ in fashion.fit(model, train, validation, 16, 500, 6e-3):
        pass
    return model, fashion.load(folder, "t10k")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nine_in_ten_photos_of_each_kind_are_predicted_right(trained_fully, tmp_path, kind):
    assert agreement(*trained_fully, kind, 400, tmp_path) >= 0.9


def enlarged(image, *size):
    return ImageOps.expand(ImageOps.invert(Image.fromarray(image.numpy())).resize(size), 20, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_photo_of_any_mode_becomes_an_image(sample, tmp_path, mode):
    photo = enlarged(sample[0][1], 200, 200)
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    else:
        photo = photo.convert("RGB").convert(mode)
    found = seen(photo, tmp_path)
    assert (found.shape, found.dtype) == ((28, 28), torch.uint8)
    assert np.corrcoef(found.flatten(), sample[0][1].flatten())[0, 1] > 0.75


def test_a_photo_is_turned_as_its_exif_says(sample, tmp_path):
    photo = enlarged(sample[0][1], 200, 200)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown after a turn to the right
    photo.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    found = prepare(open_photo(tmp_path / "turned.png"))
    torch.testing.assert_close(found, seen(photo, tmp_path), atol=1, rtol=0)


def test_light_on_black_stays_light_on_black(sample, tmp_path):
    found = seen(ImageOps.invert(enlarged(sample[0][1], 200, 200)), tmp_path)
    assert np.corrcoef(found.flatten(), sample[0][1].flatten())[0, 1] > 0.75


@pytest.mark.parametrize("gray", [0, 100, 190, 235, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_transparent_background_is_the_mask(sample, tmp_path, mode, gray):
    alpha = Image.fromarray(sample[0][1].numpy()).resize((280, 280)).point(lambda a: 255 * (a > 30))
    photo = Image.new("RGBA", alpha.size, (gray, gray, gray))
    photo.putalpha(alpha)
    found = seen(photo.convert(mode), tmp_path)
    assert np.corrcoef((found > 127).flatten(), (sample[0][1] > 30).flatten())[0, 1] > 0.8


def test_an_opaque_picture_has_no_mask_nor_has_one_with_round_corners(sample, tmp_path):
    photo = enlarged(sample[0][1], 200, 200)
    opaque, corner = photo.convert("RGBA"), photo.convert("RGBA")
    corner.paste((0, 0, 0, 0), (0, 0, 9, 9))
    expected = seen(photo, tmp_path)
    assert seen(opaque, tmp_path).equal(expected)
    torch.testing.assert_close(seen(corner, tmp_path), expected, atol=3, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_of_the_data_set_stay_as_they_are(sample, tmp_path, mode):
    for image in sample[0][:100]:
        assert seen(Image.fromarray(image.numpy()).convert(mode), tmp_path).equal(image)


def test_a_white_garment_on_gray_stays_white(sample, tmp_path):
    image = Image.fromarray(sample[0][1].numpy()).resize((200, 200))
    photo = Image.new("L", (240, 240), 130)
    photo.paste(246, (20, 20), image.point(lambda value: 255 * (value > 30)))
    pixels = np.asarray(photo) + np.random.default_rng(0).normal(0, 3, (240, 240))
    found = seen(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), tmp_path)
    assert found[found > 8].float().median() > 200


@pytest.mark.parametrize("period", [9, 16])
def test_a_garment_is_found_on_striped_wood(sample, tmp_path, period):
    image = np.asarray(Image.fromarray(sample[0][1].numpy()).resize((280, 280)), dtype=float)
    x = np.arange(400)
    photo = np.tile(150 + 45 * np.sin(x * 2 * np.pi / period), (400, 1))
    photo[60:340, 60:340][image > 30] = 75 - image[image > 30] / 10
    found = seen(Image.fromarray(photo.clip(0, 255).astype(np.uint8)), tmp_path)
    assert np.corrcoef((found > 8).flatten(), (sample[0][1] > 30).flatten())[0, 1] > 0.7


def framed(photo, left, top, right, bottom, color):
    size = photo.width + left + right, photo.height + top + bottom
    frame = Image.new("L", size, color)
    frame.paste(photo, (left, top))
    return frame


@pytest.mark.parametrize("border", [(3, 3, 3, 3, 0), (12, 12, 12, 12, 90), (0, 90, 0, 90, 0)])
def test_a_frame_or_bars_are_cut_off(sample, tmp_path, border):
    photo = enlarged(sample[0][1], 300, 300)
    found = seen(framed(photo, *border), tmp_path)
    assert np.corrcoef(found.flatten(), sample[0][1].flatten())[0, 1] > 0.75


def on_gray(sample, number=1):
    photo = np.minimum(np.asarray(enlarged(sample[0][number], 260, 260)), 200)
    return Image.fromarray(photo)


def test_what_shows_no_whole_garment_is_refused(sample, tmp_path):
    photo = on_gray(sample)
    for box in ((0, 0, 300, 150), (0, 0, 300, 220), (0, 0, 150, 300), (70, 0, 300, 300)):
        with pytest.raises(ValueError, match="reaches the edge"):
            seen(photo.crop(box), tmp_path)
    image = ImageOps.invert(Image.fromarray(sample[0][1].numpy())).resize((300, 300))
    with pytest.raises(ValueError, match="reaches the edge"):  # a whole one, without a margin
        seen(image.crop(ImageOps.invert(image).getbbox()), tmp_path)
    with pytest.raises(ValueError, match="in a frame"):
        seen(framed(photo, 40, 40, 40, 40, 255), tmp_path)
    with pytest.raises(ValueError, match="more than one garment"):
        seen(Image.fromarray(np.hstack([np.asarray(photo)] * 2)), tmp_path)
    dark = Image.fromarray((np.asarray(photo) // 25 + 20).astype(np.uint8))
    with pytest.raises(ValueError, match="too much like it"):
        seen(dark, tmp_path)


@pytest.mark.parametrize("size", [(2, 2), (3, 7), (60, 80), (300, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_refused(tmp_path, size, channels):
    noise = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"nothing but background|too small|reaches the edge"):
        seen(Image.fromarray(noise.repeat(3 // channels, axis=-1)), tmp_path)


def blank(sigma):
    pixels = np.random.default_rng(0).normal(230, sigma, (400, 600, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "photo",
    [
        *(Image.new("RGB", (50, 70), color) for color in ("white", "black", "gray")),
        Image.new("RGBA", (90, 90)), Image.new("L", (28, 28)),
        Image.new("I;16", (90, 90)), blank(3), blank(10), blank(25),
    ],
)  # fmt: skip
def test_nothing_but_background_is_refused(tmp_path, photo):
    with pytest.raises(ValueError, match=r"^nothing but background"):
        seen(photo, tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_photos_of_32_bits_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="32 bits"):
        seen(Image.fromarray(np.arange(10_000, dtype=dtype).reshape(100, 100)), tmp_path)


def test_a_large_photo_is_shrunk_before_it_is_copied(sample, tmp_path, monkeypatch):
    enlarged(sample[0][1], 4000, 4000).convert("RGBA").save(tmp_path / "photo.png")
    convert, sizes = Image.Image.convert, []
    monkeypatch.setattr(
        Image.Image, "convert", lambda i, *a, **k: sizes.append(i.size) or convert(i, *a, **k)
    )
    prepare(open_photo(tmp_path / "photo.png"))
    assert sizes
    assert max(map(max, sizes)) <= 1000


def test_16_bits_in_either_byte_order_give_the_same(sample, tmp_path):
    pixels = np.asarray(enlarged(sample[0][1], 200, 200)).astype(np.uint16) * 257
    found = []
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        path = tmp_path / f"{order[1:]}{len(found)}.tif"
        Image.frombytes(mode, pixels.shape[::-1], pixels.astype(order).tobytes()).save(path)
        found.append(prepare(open_photo(path)))
    assert found[0].equal(found[1])
    assert np.corrcoef(found[0].flatten(), sample[0][1].flatten())[0, 1] > 0.75


def test_a_png_with_a_flipped_byte_is_refused(sample, tmp_path):
    file = io.BytesIO()
    enlarged(sample[0][1], 60, 60).save(file, "PNG")
    path, content = tmp_path / "photo.png", file.getvalue()
    for place in range(8, len(content) - 12, 7):  # up to IEND, which holds nothing
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises((OSError, SyntaxError, ValueError)) as error:
            open_photo(path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("exif", [b"nonsense that is no TIFF file", b"II*\0"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_broken_exif_is_passed_over(sample, tmp_path, exif, kind):
    photo = enlarged(sample[0][1], 200, 200).convert("RGB")
    path = tmp_path / f"exif.{kind}"
    photo.save(path, exif=b"Exif\0\0" + exif, lossless=True)
    assert prepare(open_photo(path)).equal(seen(photo, tmp_path))


def header(width, height):
    """Return a PNG that claims a size, and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"


def webp_header(width, height):
    """Return a WebP like that."""
    chunk = b"VP8L\x19\0\0\0\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + bytes(21)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "content",
    [header(12_000, 12_000), header(100_000, 100_000), webp_header(12_000, 12_000)],
    ids=range(3),
)
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch, content):
    (tmp_path / "photo.png").write_bytes(content)
    monkeypatch.setattr(Image.Image, "thumbnail", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^more than 100 megapixels"):
            open_photo(tmp_path / "photo.png")


def test_heic_is_refused_without_the_words_of_pillow(tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(99))
    with pytest.raises(ValueError, match="save it as JPEG"):
        open_photo(tmp_path / "photo.heic")


def test_only_plain_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a file"):
            open_photo(path)
