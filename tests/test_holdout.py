"""The validation split: every class its share, seeded, disjoint from what is trained on."""

import pytest
import torch

from gunn_ext.data import hold_out, load_digits, make_fake
from gunn_ext.data.holdout import stratified


@pytest.mark.parametrize(("size", "count"), [(0.1, 144), (100, 100), (0.5, 718), (1, 1), (1436, 1436)])
def test_every_class_gives_its_share(size, count):
    data = load_digits(8)
    split = hold_out(data, size)
    assert (len(split.validation), len(split.train), len(split.test)) == (count, 1437 - count, 360)
    before, after = data.train.labels.bincount(minlength=10), split.validation.labels.bincount(minlength=10)
    assert (after - before * count / 1437).abs().max() < 1
    assert torch.equal(after + split.train.labels.bincount(minlength=10), before)
    assert (split.mean, split.std) == (data.mean, data.std)


def test_no_image_is_in_both_and_none_is_lost():
    data = make_fake((1, 6, 6), classes=3, train_images=40)
    split = hold_out(data, 12, seed=2)
    images = torch.cat([split.train.images, split.validation.images]).flatten(1)
    assert torch.equal(images.unique(dim=0), data.train.images.flatten(1).unique(dim=0))
    rows = {tuple(image): int(label) for image, label in zip(data.train.images.flatten(1).tolist(),
                                                             data.train.labels, strict=True)}  # fmt: skip
    for part in (split.train, split.validation):
        assert [rows[tuple(i)] for i in part.images.flatten(1).tolist()] == part.labels.tolist()


def test_the_choice_depends_on_the_seed_alone():
    labels = torch.arange(100) % 7
    torch.manual_seed(5)
    assert torch.equal(stratified(labels, 20, 1), stratified(labels, 20, 1))
    assert not torch.equal(stratified(labels, 20, 1), stratified(labels, 20, 2))


@pytest.mark.parametrize(("size", "count"), [(0.0001, 0), (40, 40), (50, 50)])
def test_nothing_and_everything_are_refused(size, count):
    data = make_fake((1, 2, 2), train_images=40)
    with pytest.raises(ValueError, match=f"validation.size={size:g} holds out {count} of 40 training images"):
        hold_out(data, size)
