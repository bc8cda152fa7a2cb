"""The rendered set: the same bytes everywhere, every class what it says, nothing but figure and filling to go by."""

import hashlib

import pytest
import torch

from gunn_ext.data import make_shapes
from gunn_ext.data.shapes import FILLINGS, FORMS, MOST_CLASSES, scramble


def digest(images):
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def shapes():
    return make_shapes(train_images=400, test_images=80)


def test_the_bytes_are_the_same_on_every_machine(shapes):
    assert (digest(shapes.train.images), digest(shapes.test.images)) == ("3b990eea459644d2", "5c6b3392a54c5f65")


def test_a_small_set_is_the_beginning_of_a_large_one(shapes):
    small = make_shapes(train_images=50, test_images=10)
    assert torch.equal(small.train.images, shapes.train.images[:50])
    assert torch.equal(small.test.images, shapes.test.images[:10])


def test_the_global_random_state_and_the_number_of_threads_do_not_matter(shapes):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = make_shapes(train_images=30, test_images=0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again.train.images, shapes.train.images[:30])
    assert len(again.test) == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [{"seed": 1}, {"difficulty": 1}])
def test_seed_and_difficulty_change_every_image(shapes, change):
    other = make_shapes(train_images=30, test_images=0, **change).train.images
    assert (other != shapes.train.images[:30]).flatten(1).any(1).all()


def test_no_image_comes_twice_and_none_of_the_test_split_in_training(shapes):
    images = torch.cat([shapes.train.images, shapes.test.images]).flatten(1)
    assert len(images.unique(dim=0)) == 480


def test_classes_are_balanced_and_the_sizes_those_asked_for(shapes):
    assert shapes.image_shape == (3, 32, 32)
    assert (shapes.classes, MOST_CLASSES, len(FORMS), len(FILLINGS)) == (40, 40, 10, 4)
    assert shapes.train.labels.bincount().tolist() == [10] * 40
    assert shapes.test.labels.bincount().tolist() == [2] * 40
    assert shapes.mirror


def test_scramble_is_a_bijection_of_32_bit_words():
    words = torch.cat([torch.arange(50_000), 2**32 - 1 - torch.arange(50_000), torch.arange(50_000) << 16])
    out = scramble(words)
    assert 0 <= int(out.min()) <= int(out.max()) < 2**32
    assert len(out.unique()) == len(words.unique())


def grid(size=101):
    axis = torch.linspace(-320, 320, size).round().to(torch.int32)
    return axis[None, :].expand(size, size), axis[:, None].expand(size, size)


@pytest.mark.parametrize("name", FORMS)
def test_forms_stay_within_their_radius_and_are_large_enough_to_be_seen(name):
    u, v = grid()
    covered = FORMS[name](u, v)
    assert not covered[u * u + v * v > 256**2].any()
    assert 0.2 < covered[u * u + v * v < 256**2].double().mean() < 0.95


@pytest.mark.parametrize("name", FORMS)
def test_a_mirrored_form_is_the_form_turned(name):
    u, v = grid()
    form = FORMS[name]
    plain = form(u, v)
    turned = [form(u, -v), form(-u, v), form(v, u)]
    # A mirror image about any axis differs from every other one by a turn, so that one axis of symmetry is enough.
    assert any(torch.equal(plain, other) for other in turned)


def test_no_form_is_another():
    u, v = grid()
    drawn = torch.stack([form(u, v) for form in FORMS.values()]).flatten(1)
    different = (drawn[:, None] != drawn[None]).sum(2)
    assert int(different[~torch.eye(len(FORMS), dtype=torch.bool)].min()) > 500


def test_the_fillings_are_what_they_are_called():
    u, v = torch.arange(32).expand(32, 32), torch.arange(32)[:, None].expand(32, 32)
    filled = {name: fill(u, v) for name, fill in FILLINGS.items()}
    assert not filled["plain"].any()
    assert torch.equal(filled["stripes"], u < 16)
    assert torch.equal(filled["checks"], (u < 16) == (v < 16))
    assert torch.equal(filled["dots"], (u - 16) ** 2 + (v - 16) ** 2 < 144)


def test_an_easy_image_shows_its_figure_in_one_colour_on_its_ground():
    """Without clutter before it, the middle of a plain disc has one colour, and a patterned one has two."""
    data = make_shapes(train_images=400, test_images=0, difficulty=0)
    spread = {}
    for filling in range(4):
        discs = data.train.images[data.train.labels == 10 * filling].double()
        middle = discs[:, :, 14:18, 14:18].flatten(2)
        spread[filling] = (middle.amax(2) - middle.amin(2)).amax(1)
    assert spread[0].median() < 20
    for filling in (1, 2, 3):
        assert spread[filling].median() > 60


def test_colours_do_not_tell_the_class():
    """A linear classifier on the mean colour is no better than chance."""
    data = make_shapes(4, train_images=1000, test_images=500)
    features = [torch.cat([s.images.double().mean((2, 3)), torch.ones(len(s), 1)], 1) for s in (data.train, data.test)]
    targets = torch.nn.functional.one_hot(data.train.labels, 4).double()
    weights = torch.linalg.lstsq(features[0], targets).solution
    accuracy = ((features[1] @ weights).argmax(1) == data.test.labels).double().mean()
    assert accuracy < 0.34


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 41}, "classes must be from 2 to 40, got 41"),
        ({"classes": 1}, "classes must be from 2 to 40, got 1"),
        ({"train_images": 0}, "train_images must be from 1"),
        ({"test_images": -1}, "test_images must be from 0"),
        ({"difficulty": 4}, "difficulty must be from 0 to 3, got 4"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"shapes: {message}"):
        make_shapes(**options)
