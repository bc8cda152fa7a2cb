"""The data sets and the augmentation: values, bytes, and the laws of the random transformations."""

import io
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gunn_ext.data import (
    Augmentation,
    ImageDataset,
    Split,
    augment,
    batches,
    cyclic_shift,
    load_digits,
    make_fake,
    mirror,
    shift_crop,
)
from gunn_ext.data.dataset import batches_per_epoch
from gunn_ext.data.npz import read_npz


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_the_1797_scans_in_a_fixed_stratified_split():
    data = load_digits(8)
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    assert data.image_shape == (1, 8, 8)
    train, test = data.train.labels.bincount(), data.test.labels.bincount()
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert test.tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert not data.mirror


def test_digits_are_scaled_to_bytes():
    data = load_digits(8)
    values = torch.cat([data.train.images, data.test.images]).unique()
    assert values.tolist() == [round(v * 255 / 16) for v in range(17)]
    # The first scan of the set, a zero, is in the training split; its second row is 0 0 13 15 10 15 5 0.
    assert data.train.labels[0] == 0
    expected = [round(v * 255 / 16) for v in (0, 0, 13, 15, 10, 15, 5, 0)]
    assert data.train.images[0, 0, 1].tolist() == expected


def test_digits_equal_what_scikit_learn_bundles():
    datasets = pytest.importorskip("sklearn.datasets")
    from gunn_ext.data.make_digits import stratified_test_indices

    scans, data = datasets.load_digits(), load_digits(8)
    test = stratified_test_indices(scans.target.tolist())
    train = sorted(set(range(1797)) - set(test))
    for split, indices in ((data.train, train), (data.test, test)):
        expected = (torch.tensor(scans.images[indices]) * 255 / 16).round()
        assert torch.equal(split.images[:, 0].double(), expected)
        assert split.labels.tolist() == scans.target[indices].tolist()


def test_digits_are_resized_bilinearly():
    small, large = load_digits(8), load_digits(16)
    assert large.image_shape == (1, 16, 16)
    scan = small.train.images[0, 0].double()
    # Inside, a pixel of the doubled image mixes its four neighbours 9:3:3:1.
    corner = (9 * scan[3, 3] + 3 * scan[3, 2] + 3 * scan[2, 3] + scan[2, 2]) / 16
    assert abs(large.train.images[0, 0, 6, 6].item() - corner.item()) <= 1
    assert torch.equal(small.train.labels, large.train.labels)


@pytest.mark.parametrize("size", [0, -1, 8.0, True, "8"])
def test_digits_refuse_an_impossible_size(size):
    with pytest.raises(ValueError, match="digits: image_size must be a positive integer, got"):
        load_digits(size)


def test_loading_digits_needs_no_numpy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    assert len(load_digits(8).train) == 1437


# reading .npz -------------------------------------------------------------------------------------------------------


def npy(data, descr="|u1", shape=(2, 3), fortran=False):
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(**arrays):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return file


def test_npz_arrays_are_read_by_name():
    words = torch.tensor([1, -2], dtype=torch.int16)
    file = npz(a=npy(bytes(range(6))), b=npy(bytes.fromhex("0100feff"), "<i2", (2,)), c=npy(b"", "<f4", (0, 2)))
    arrays = read_npz(file, "x.npz")
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(arrays["b"], words)
    assert arrays["c"].shape == (0, 2)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (io.BytesIO(b"no zip"), "x.npz: not a readable .npz file"),
        (npz(a=npy(b"12345")), "x.npz/a.npy: 5 bytes of data, expected 6; the file is damaged"),
        (npz(a=npy(b"123456", ">i4")), "dtype '>i4'"),
        (npz(a=npy(b"123456", fortran=True)), "Fortran order True"),
        (npz(a=b"plain text of some length"), "expected b'.x93NUMPY'"),
    ],
    ids=["no zip", "short", "big-endian", "fortran", "no npy"],
)
def test_npz_that_is_damaged_or_foreign_is_refused(file, message):
    with pytest.raises(ValueError, match=message):
        read_npz(file, "x.npz")


# fake ---------------------------------------------------------------------------------------------------------------


def test_fake_has_the_asked_sizes_and_depends_on_the_seed_alone():
    data = make_fake((2, 5, 7), classes=3, train_images=11, test_images=4, seed=1)
    assert data.train.images.shape == (11, 2, 5, 7)
    assert data.test.images.shape == (4, 2, 5, 7)
    assert int(data.train.labels.max()) < 3
    torch.manual_seed(99)
    assert torch.equal(data.train.images, make_fake((2, 5, 7), 3, 11, 4, seed=1).train.images)
    assert not torch.equal(data.train.images, make_fake((2, 5, 7), 3, 11, 4, seed=2).train.images)


def test_fake_test_split_may_be_empty():
    assert len(make_fake((1, 2, 2), test_images=0).test) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shape": (0, 4, 4)}, "channels"), ({"classes": 0}, "classes"), ({"train_images": 0}, "train_images")],
)
def test_fake_refuses_empty_sizes(options, message):
    with pytest.raises(ValueError, match=f"fake: {message} must be at least 1, got 0"):
        make_fake(**options)


# statistics and splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [load_digits(16), make_fake((3, 4, 6), train_images=50)], ids=["digits", "fake"])
def test_normalised_training_images_have_mean_0_and_variance_1(data):
    images = data.normalize(data.train.images).double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-6
    assert (images.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_a_constant_channel_is_not_divided_by_zero():
    split = Split(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8), torch.tensor([0, 1]))
    data = ImageDataset.from_splits("flat", split, split, 2, mirror=False)
    assert (data.mean, data.std) == ((7.0,), (1.0,))
    assert data.normalize(split.images).abs().max() == 0


def test_splits_that_do_not_fit_are_refused():
    images, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"images must be uint8 .* got torch.float32"):
        Split(images.float(), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\)"):
        Split(images, labels[:1])
    with pytest.raises(ValueError, match="training labels run from 0 to 1, expected 0 to 0 for 1 classes"):
        ImageDataset.from_splits("x", Split(images, labels), Split(images, labels), 1, mirror=False)
    with pytest.raises(ValueError, match="the training split is empty"):
        ImageDataset.from_splits("x", Split(images[:0], labels[:0]), Split(images, labels), 2, mirror=False)
    with pytest.raises(ValueError, match="both must have the same shape"):
        ImageDataset.from_splits("x", Split(images, labels), Split(images[..., :2], labels), 2, mirror=False)


# batches ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 5))
def test_batches_are_equal_disjoint_and_random(count, size, seed):
    drawn = list(batches(count, size, seeded(seed)))
    assert len(drawn) == batches_per_epoch(count, size)
    assert {len(batch) for batch in drawn} == {min(size, count)}
    seen = torch.cat(drawn)
    assert len(seen.unique()) == len(seen)
    assert 0 <= int(seen.min()) <= int(seen.max()) < count
    assert torch.equal(seen, torch.cat(list(batches(count, size, seeded(seed)))))


# augmentation -------------------------------------------------------------------------------------------------------


def numbered(count, channels=2, height=5, width=7):
    """Images all of whose pixels differ, none of them 0."""
    return torch.arange(1, count * channels * height * width + 1).reshape(count, channels, height, width).float()


def which(image, candidates):
    """The names of the candidates that equal the image."""
    return [name for name, candidate in candidates.items() if torch.equal(image, candidate)]


def test_mirror_leaves_or_mirrors_each_image_about_half_the_time():
    images = numbered(400)
    out = mirror(images, seeded())
    kinds = [which(o, {"left": i, "mirrored": i.flip(-1)}) for o, i in zip(out, images, strict=True)]
    assert all(len(kind) == 1 for kind in kinds)
    assert 160 <= kinds.count(["mirrored"]) <= 240


def test_shift_crop_is_a_shift_filled_with_zeros_and_reaches_every_offset():
    images, padding = numbered(400), 2
    out = shift_crop(images, padding, seeded())
    offsets = []
    for o, i in zip(out, images, strict=True):
        padded = torch.nn.functional.pad(i, (padding,) * 4)
        windows = {(y, x): padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)}
        offsets += which(o, windows)
    assert len(offsets) == 400
    assert set(offsets) == {(y, x) for y in range(5) for x in range(5)}


def test_cyclic_shift_rolls_one_axis_two_times_in_three():
    images = numbered(900)
    out = cyclic_shift(images, seeded())
    kinds = []
    for o, i in zip(out, images, strict=True):
        candidates = {("none", 0): i}
        candidates |= {("height", k): i.roll(k, 1) for k in range(1, 5)}
        candidates |= {("width", k): i.roll(k, 2) for k in range(1, 7)}
        (kind,) = which(o, candidates)
        kinds.append(kind)
    axes = [axis for axis, _ in kinds]
    # A third is left alone; an offset of 0 leaves alone 1/5 and 1/7 of the other two thirds.
    assert abs(axes.count("height") / 900 - 1 / 3 * 4 / 5) < 0.05
    assert abs(axes.count("width") / 900 - 1 / 3 * 6 / 7) < 0.05
    assert len(set(kinds)) == 1 + 4 + 6


def test_augmentation_repeats_with_the_generator_and_leaves_its_input_and_the_global_state_alone():
    images, options = numbered(20), Augmentation(mirror=True, crop_padding=1, cyclic_shift=True)
    before, state = images.clone(), torch.get_rng_state()
    first, second = augment(images, options, seeded(3)), augment(images, options, seeded(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, options, seeded(4)))
    assert torch.equal(images, before)
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_switched_off_is_the_identity_and_draws_nothing():
    images, generator = numbered(3), seeded(3)
    assert torch.equal(augment(images, Augmentation(), generator), images)
    assert torch.equal(generator.get_state(), seeded(3).get_state())


def test_the_padding_is_the_mean_colour():
    data = make_fake((3, 4, 4), train_images=8)
    padded = shift_crop(data.normalize(data.train.images), 4, seeded(1))
    colour = padded * torch.tensor(data.std).view(1, 3, 1, 1) + torch.tensor(data.mean).view(1, 3, 1, 1)
    border = colour[padded == 0]
    assert len(border)
    assert {round(v, 3) for v in border.tolist()} == {round(v, 3) for v in data.mean}
