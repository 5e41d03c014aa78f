"""Pictures of inputs, decoded by another library than the one that wrote them."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image as reader

from shrinkkit.measure import scoring
from shrinkkit.measure.scoring import COLOURS, SIDE


def decoded(png):
    """Return the pixels of a PNG in base64, (H, W) or (H, W, 3), from 0 to 255."""
    pixels = np.rint(255 * reader.imread(io.BytesIO(base64.b64decode(png, validate=True)), format="png"))
    return pixels if pixels.ndim == 2 else pixels[:, :, :3]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(1, 8, 8), True),
        (torch.zeros(3, 300, 8, dtype=torch.bfloat16), True),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), True),
        (torch.zeros(1, 8, 8, dtype=torch.int64), False),
        (torch.zeros(2, 8, 8), False),
        (torch.zeros(1, 7, 8), False),
        (torch.zeros(32, 32), False),
        (torch.zeros(1, 3, 8, 8), False),
        (torch.zeros(()), False),
    ],
)
def test_images_have_one_or_three_channels_first(x, expected):
    assert scoring.is_image(x) is expected


def test_bytes_are_shown_as_they_are():
    image = torch.arange(80, 180, dtype=torch.uint8).reshape(1, 10, 10)
    assert (decoded(scoring.png(image)) == image[0].numpy()).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 20), st.integers(8, 20), st.integers(0, 2**31))
def test_grey_pixels_and_their_places_survive(height, width, seed):
    image = torch.randint(0, 256, (1, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    assert (decoded(scoring.png(image)) == image[0].numpy()).all()


def test_few_colours_are_kept_exactly():
    colours = torch.randint(0, 256, (COLOURS, 3), generator=torch.Generator().manual_seed(0)).byte()
    image = colours[torch.arange(160) % COLOURS].reshape(10, 16, 3).permute(2, 0, 1)
    assert (decoded(scoring.png(image)) == image.permute(1, 2, 0).numpy()).all()


def test_many_colours_become_few_that_are_near():
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([4 * row, 4 * column, 255 - 4 * row]).byte()
    found = decoded(scoring.png(image))
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= COLOURS
    assert np.abs(found - image.permute(1, 2, 0).numpy()).mean() < 12


def test_floats_of_an_image_alone_span_its_own_range():
    image = torch.linspace(-3, 5, 100).reshape(1, 10, 10)
    found = decoded(scoring.png(image))
    assert (found.min(), found.max()) == (0, 255)
    assert found[0, 0] < found[5, 5] < found[9, 9]


def test_normalisation_by_channel_is_undone_by_the_span_of_the_split():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0], images[1, :, 0, 0] = 0, 1
    mean, deviation = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    inputs = (images - mean[:, None, None]) / deviation[:, None, None]
    found = decoded(scoring.png(inputs[2], between=scoring.span(inputs)))
    assert np.abs(found - 255 * images[2].permute(1, 2, 0).numpy()).max() <= 0.51


def test_a_dark_image_stays_dark_beside_a_bright_one():
    images = torch.stack([torch.linspace(0, 0.1, 64), torch.linspace(0.5, 1, 64)]).reshape(2, 1, 8, 8)
    between = scoring.join([scoring.span(images[:1]), scoring.span(images[1:])])
    assert decoded(scoring.png(images[0], between=between)).max() == 26
    assert decoded(scoring.png(images[1], between=between)).max() == 255


def test_large_images_are_shrunk_and_keep_their_shape():
    image = torch.zeros(1, 192, 384)
    image[:, 96:] = 1
    found = decoded(scoring.png(image))
    assert found.shape == (48, SIDE)
    assert (found[:24] == 0).all()
    assert (found[24:] == 255).all()


@pytest.mark.parametrize("value", [0.0, 7.5, float("nan"), float("inf")])
def test_an_image_without_contrast_is_still_a_picture(value):
    image = torch.full((3, 8, 8), value)
    assert decoded(scoring.png(image)).shape == (8, 8, 3)
    assert decoded(scoring.png(image, between=scoring.span(image[None]))).shape == (8, 8, 3)


def test_a_large_photograph_takes_few_bytes():
    noise = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(noise[None], size=(400, 400), mode="bicubic")[0]
    assert len(scoring.png(image)) < 9000
