from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from search.data import decode as module
from search.data.decode import Corrupt, ImageSpec, decode, decode_all
from tests.images import png, random_pixels

RGB = ImageSpec(size=(24, 16), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = ImageSpec(size=(24, 16), channels=1, mean=(0.0,), std=(1.0,))


def test_an_image_of_the_right_size_is_unchanged() -> None:
    pixels = random_pixels(1, 24, 16)[0]
    assert np.array_equal(decode(png(pixels), RGB), pixels)


def test_grey_and_palette_images_become_what_the_model_takes() -> None:
    pixels = random_pixels(1, 24, 16)[0]
    grey = decode(png(pixels), GREY)
    assert grey.shape == (24, 16, 1)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(grey[..., 0], expected)
    assert decode(png(pixels[..., 0]), RGB).shape == (24, 16, 3)


@pytest.mark.parametrize("size", [(48, 32), (60, 20), (12, 30)])
def test_other_sizes_are_scaled_and_cut_at_the_centre(size: tuple[int, int]) -> None:
    # A horizontal ramp, mirror-symmetric: what is left must be symmetric too.
    ramp = np.abs(np.linspace(-200, 200, size[1])).astype(np.uint8)
    pixels = np.repeat(np.repeat(ramp[None, :, None], size[0], 0), 3, 2)
    out = decode(png(pixels), RGB).astype(int)
    assert out.shape == (24, 16, 3)
    assert np.abs(out - out[:, ::-1]).max() <= 3


@pytest.mark.parametrize("data", [None, b"", b"no image", png(random_pixels(1, 24, 16)[0])[:200]])
def test_what_is_no_image_is_refused(data: bytes | None) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data, RGB)


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(module, "LARGEST_PIXELS", 383)
    with pytest.raises(ValueError, match="16 x 24 pixels"):
        decode(png(random_pixels(1, 24, 16)[0]), RGB)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    with pytest.raises(ValueError, match="pixels"):
        decode(bomb.getvalue(), RGB)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "TGA", "ICO", "PPM"])
def test_formats_that_data_sets_do_not_hold_are_refused(kind: str) -> None:
    # Pillow draws EPS by running Ghostscript.
    stream = io.BytesIO()
    Image.fromarray(random_pixels(1, 24, 16)[0]).save(stream, format=kind)
    with pytest.raises(ValueError, match="cannot identify image file"):
        decode(stream.getvalue(), RGB)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "TIFF", "WEBP"])
def test_formats_that_data_sets_hold_are_read(kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(random_pixels(1, 24, 16)[0]).save(stream, format=kind)
    assert decode(stream.getvalue(), RGB).shape == (24, 16, 3)


def test_corrupt_images_are_named_counted_and_skipped_up_to_a_limit() -> None:
    pixels = random_pixels(4, 24, 16)
    files = [png(pixels[0]), b"x", png(pixels[2]), None]
    rows = [(f"{i}.png", data, i) for i, data in enumerate(files)]
    with ThreadPoolExecutor(2) as pool:
        corrupt = Corrupt(limit=2, names=[])
        found = list(decode_all(rows, RGB, corrupt, pool))
        assert [label for _, label in found] == [0, 2]
        assert np.array_equal(found[1][0], pixels[2])
        assert corrupt.names == ["1.png", "3.png"]
        with pytest.raises(
            ValueError, match=r"3\.png is corrupt \(no bytes\).*max_corrupt = 1.*1\.png"
        ):
            list(decode_all(rows, RGB, Corrupt(limit=1, names=[]), pool))


def test_channels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"channels is 4; image files give 1 \(grey\) or 3"):
        ImageSpec(size=(2, 2), channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)
