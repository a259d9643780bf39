from __future__ import annotations

import pytest
import torch

from pyro_ebm import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 9, 13), (2, 1, 5)]
BATCHES = [(), (4,), (3, 4), (2, 3, 4)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [MLPEncoder, ConvEncoder])
def test_an_encoder_gives_location_and_positive_scale(kind, shape, batch):
    encoder = kind(shape, 3, hidden=(4, 5))
    loc, scale = encoder(torch.randn(*batch, *shape))
    assert loc.shape == scale.shape == (*batch, 3)
    assert (scale > 0).all()


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [MLPDecoder, ConvDecoder])
def test_a_decoder_gives_the_event_shape(kind, shape, batch, num_outputs):
    output = kind(3, shape, hidden=(5, 4), num_outputs=num_outputs)(torch.randn(*batch, 3))
    outputs = (output,) if num_outputs == 1 else output
    assert [o.shape for o in outputs] == [(*batch, *shape)] * num_outputs


@pytest.mark.parametrize("hidden", [(4,), (4, 5, 6)])
def test_convolutions_of_any_depth_meet_the_size(hidden):
    z = ConvEncoder((1, 11, 28), 2, hidden)(torch.randn(2, 1, 11, 28))[0]
    assert ConvDecoder(2, (1, 11, 28), hidden[::-1])(z).shape == (2, 1, 11, 28)


@pytest.mark.parametrize("kind", [MLPEncoder, ConvEncoder])
def test_leading_dimensions_are_a_batch(kind):
    encoder = kind((1, 8, 8), 2, (4,)).double()
    x = torch.randn(3, 4, 1, 8, 8, dtype=torch.double)
    one_by_one = torch.stack([torch.stack([encoder(item)[0] for item in row]) for row in x])
    torch.testing.assert_close(encoder(x)[0], one_by_one)


@pytest.mark.parametrize("kind", [MLPDecoder, ConvDecoder])
def test_decoded_batches_are_decoded_one_by_one(kind):
    decoder = kind(2, (2, 5, 6), (4,), num_outputs=2).double()
    z = torch.randn(3, 4, 2, dtype=torch.double)
    for index in range(2):
        one_by_one = torch.stack([torch.stack([decoder(item)[index] for item in row]) for row in z])
        torch.testing.assert_close(decoder(z)[index], one_by_one)


def test_a_vector_needs_no_tuple():
    assert MLPDecoder(2, 7, ())(torch.randn(4, 2)).shape == (4, 7)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MLPEncoder((), 2), r"event_shape must hold one or more positive whole numbers, got \(\)"),
        (lambda: MLPEncoder((8, 0), 2), r"event_shape must hold .* got \(8, 0\)"),
        (lambda: MLPEncoder((8, 8), 0), r"latent_dim must be a whole number of at least 1, got 0"),
        (lambda: MLPDecoder(2, (8,), (16, -1)), r"hidden must hold .* got \(16, -1\)"),
        (lambda: MLPDecoder(2, (8,), num_outputs=0), "num_outputs must be a whole number of at least 1"),
        (lambda: ConvEncoder((8, 8), 2), r"\(channels, height, width\).*got \(8, 8\); add a channel"),
        (lambda: ConvDecoder(2, (1, 8, 8), ()), r"hidden must hold 1 or more positive layer sizes"),
        (
            lambda: ConvEncoder((1, 4, 4), 2)(torch.ones(3, 1, 2, 8)),
            r"value must have .* 1, 4, 4\), got",
        ),
        (
            lambda: MLPEncoder((4,), 2)(torch.ones(3, 5)),
            r"value must have .*, 4\), got \(3, 5\)",
        ),
    ],
)
def test_wrong_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
