"""CIFAR in its published forms: small files written byte by byte as those are, intact, damaged and hostile."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gunn_ext.data.cifar import CIFAR10, CIFAR100, PAGE, load_cifar
from gunn_ext.data.dataset import channel_statistics

PIXELS = 3072
SETS = {"cifar10": replace(CIFAR10, train_images=50, test_images=20),
        "cifar100": replace(CIFAR100, train_images=200, test_images=100)}  # fmt: skip
FORMS = [(name, form) for name in SETS for form in ("binary", "python")]


# writing the formats ------------------------------------------------------------------------------------------------


def content(name):
    """Images and labels of all levels, of the training and the test split."""
    published, draw = SETS[name], torch.Generator().manual_seed(1)

    def split(count):
        images = torch.randint(256, (count, PIXELS), generator=draw, dtype=torch.uint8)
        order = torch.randperm(count, generator=draw)
        return images, torch.stack([order % classes for classes in published.classes], 1)

    return split(published.train_images), split(published.test_images)


def records(images, labels):
    return torch.cat([labels.to(torch.uint8), images], 1).numpy().tobytes()


def text(value):
    """A string of Python 2."""
    data = value if isinstance(value, bytes) else value.encode()
    return b"T" + struct.pack("<i", len(data)) + data


def array(images, dtype="u1", fortran=False):
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape)
    data = (images.T if fortran else images).contiguous().numpy().tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
        b"(K\x01" + shape + b"\x86cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R"
        b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if fortran else b"\x89") + text(data) + b"tb"
    )  # fmt: skip


def integers(values):
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def batch(published, images, labels, **changes):
    """A pickle of protocol 2 as Python 2 wrote it."""
    items = {
        "batch_label": text("a batch"),
        "data": array(images),
        **{key: integers(labels[:, i].tolist()) for i, key in enumerate(published.keys)},
        "filenames": b"](" + b"".join(text(f"{i}.png") for i in range(len(images))) + b"e",
    } | changes
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items() if value) + b"u."


def write(folder, name, kind):
    """Write a set; returns what `load_cifar` takes for it, with the checksums of these files."""
    published = SETS[name]
    number = 0 if kind == "binary" else 1
    form = published.forms[number]
    (images, labels), test = content(name)
    size = len(images) // len(form.train)
    parts = {file: (images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size])
             for i, file in enumerate(form.train)} | {form.test: test}  # fmt: skip
    target = folder / form.folder
    target.mkdir(parents=True)
    for file, part in parts.items():
        (target / file).write_bytes(records(*part) if kind == "binary" else batch(published, *part))
    return resum(published, number, target)


def resum(published, number, target, pack=False):
    """The description of a set with the checksums of what lies in a folder."""
    form = published.forms[number]
    archive = target.parent / form.archive
    if pack:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(target, form.folder)
        form = replace(form, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    names = (*form.train, form.test) if form.pickled else ()
    form = replace(form, sums={n: hashlib.md5((target / n).read_bytes()).hexdigest() for n in names})
    forms = tuple(form if i == number else other for i, other in enumerate(published.forms))
    return replace(published, forms=forms)


def assert_is(data, name, level=-1):
    (images, labels), (test_images, test_labels) = content(name)
    assert torch.equal(data.train.images, images.view(-1, 3, 32, 32))
    assert torch.equal(data.train.labels, labels[:, level])
    assert torch.equal(data.test.images, test_images.view(-1, 3, 32, 32))
    assert torch.equal(data.test.labels, test_labels[:, level])


# reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_each_form_is_read_packed_and_unpacked(tmp_path, name, kind):
    published = write(tmp_path, name, kind)
    form = published.forms[kind == "python"]
    for place in (tmp_path, tmp_path / form.folder):
        assert_is(load_cifar(published, place), name)
    published = resum(published, int(kind == "python"), tmp_path / form.folder, pack=True)
    for file in (tmp_path / form.folder).iterdir():
        file.unlink()
    for place in (tmp_path, tmp_path / form.archive):
        assert_is(load_cifar(published, place), name)
    renamed = (tmp_path / form.archive).rename(tmp_path / "renamed")
    assert_is(load_cifar(published, renamed), name)


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar100_has_coarse_labels_too(tmp_path, kind):
    published = write(tmp_path, "cifar100", kind)
    fine, coarse = load_cifar(published, tmp_path), load_cifar(published, str(tmp_path), coarse=True)
    assert (fine.classes, coarse.classes) == (100, 20)
    assert_is(coarse, "cifar100", level=0)


def test_normalisation_is_that_of_the_recipe(tmp_path):
    data = load_cifar(write(tmp_path, "cifar10", "binary"), tmp_path)
    assert (data.name, data.classes, data.image_shape, data.mirror) == ("cifar10", 10, (3, 32, 32), True)
    assert (data.mean, data.std) == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert (CIFAR100.mean, CIFAR100.std) == ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))


@pytest.mark.parametrize("published", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_the_constants_are_those_of_the_published_images(published):
    place = Path(os.environ.get("GUNN_DATA", "data"))
    try:
        data = load_cifar(published, place)
    except FileNotFoundError:
        pytest.skip(f"no {published.title} in {place} (GUNN_DATA)")
    mean, std = channel_statistics(data.train.images)
    assert max(abs(a - b) for a, b in zip(mean + std, data.mean + data.std, strict=True)) < 0.06


def test_the_files_are_as_large_as_published():
    sizes = {p.name: p.train_images // len(p.forms[0].train) * (PIXELS + len(p.classes)) for p in (CIFAR10, CIFAR100)}
    assert sizes == {"cifar10": 30_730_000, "cifar100": 153_700_000}


def test_a_fortran_ordered_batch_is_read_as_what_it_means(tmp_path):
    published = write(tmp_path, "cifar100", "python")
    images, labels = content("cifar100")[0]
    target = tmp_path / "cifar-100-python"
    (target / "train").write_bytes(batch(published, images, labels, data=array(images, fortran=True)))
    assert_is(load_cifar(resum(published, 1, target), tmp_path), "cifar100")


# what is missing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["empty", "nowhere"])
def test_a_missing_set_says_what_to_fetch_and_where_to_put_it(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load_cifar(CIFAR10, tmp_path / place)
    for part in (str(tmp_path / place), "cifar-10-binary.tar.gz or cifar-10-python.tar.gz", PAGE, "--data_path"):
        assert part in str(error.value)


def test_a_missing_file_of_a_set_is_named(tmp_path):
    published = write(tmp_path, "cifar10", "binary")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin: missing .* unpack cifar-10-binary.tar.gz again"):
        load_cifar(published, tmp_path)


# what is damaged ----------------------------------------------------------------------------------------------------


def test_another_archive_is_refused_by_its_checksum(tmp_path):
    write(tmp_path, "cifar10", "binary")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    message = f"{archive.stat().st_size:,} bytes with the MD5 sum .*c32a1d4ab5d03f1284b67883e8d87530.*fetch it again"
    with pytest.raises(ValueError, match=message):
        load_cifar(CIFAR10, archive)


def test_an_archive_without_a_file_is_refused(tmp_path):
    published = write(tmp_path, "cifar100", "binary")
    target = tmp_path / "cifar-100-binary"
    (target / "test.bin").unlink()
    published = resum(published, 0, target, pack=True)
    with pytest.raises(ValueError, match="holds no file cifar-100-binary/test.bin"):
        load_cifar(published, tmp_path / "cifar-100-binary.tar.gz")


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "too long"])
def test_a_file_of_the_wrong_size_is_refused_with_sizes(tmp_path, change):
    published = write(tmp_path, "cifar10", "binary")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-1] if change < 0 else data + b"0")
    with pytest.raises(ValueError, match=f"data_batch_2.bin: {30730 + change:,} bytes, expected 30,730; .* damaged"):
        load_cifar(published, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: 10, "data_batch_1.bin: label 10 of image 3, expected 0 to 9"),
        (lambda label: (label + 1) % 10, "training images: [46] have label ., expected 5 of every one"),
    ],
    ids=["out of range", "too often"],
)
def test_a_wrong_label_is_refused(tmp_path, change, message):
    published = write(tmp_path, "cifar10", "binary")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin"
    data = bytearray(file.read_bytes())
    data[3 * 3073] = change(data[3 * 3073])
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_cifar(published, tmp_path)


def test_a_changed_pickle_is_refused_before_it_is_read(tmp_path):
    published = write(tmp_path, "cifar10", "python")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    size = len(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"data_batch_1: {size:,} bytes with the MD5 sum .*, expected"):
        load_cifar(published, tmp_path)


class Harmful:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


IMAGES, LABELS = torch.zeros(200, PIXELS, dtype=torch.uint8), torch.arange(200)[:, None] % torch.tensor([20, 100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_labels": None}, r"expected the keys data, coarse_labels, fine_labels, got \['batch_label'"),
        ({"data": None}, "expected the keys data"),
        ({"data": array(IMAGES, "i1")}, "data must be an array of bytes"),
        ({"data": text("no array")}, "data must be an array of bytes"),
        ({"data": array(IMAGES[:, :3000])}, r"data of shape \(200, 3000\), expected \(200, 3072\)"),
        ({"data": array(IMAGES[:7])}, "coarse_labels must be a list of 7 integers"),
        ({"fine_labels": integers([1, 2, 3])}, "fine_labels must be a list of 200 integers"),
        ({"fine_labels": b"](" + text("cat") * 200 + b"e"}, "fine_labels must be a list of 200 integers"),
        ({"fine_labels": integers([200] * 200)}, "label 200 of image 0, expected 0 to 99"),
        ({"data": b"cbuiltins\neval\n" + text("1 + 1") + b"\x85R"}, "it asks for builtins.eval"),
        ({"data": b"cnumpy\nload\n" + text("x") + b"\x85R"}, "it asks for numpy.load"),
    ],
    ids=["no labels", "no data", "dtype", "no array", "few pixels", "few images", "few labels", "text labels",
         "label", "eval", "numpy.load"],
)  # fmt: skip
def test_a_wrong_pickle_is_refused(tmp_path, changes, message):
    published = write(tmp_path, "cifar100", "python")
    target = tmp_path / "cifar-100-python"
    (target / "train").write_bytes(batch(published, IMAGES, LABELS, **changes))
    with pytest.raises(ValueError, match=message) as error:
        load_cifar(resum(published, 1, target), tmp_path)
    assert str(target / "train") in str(error.value)


@pytest.mark.parametrize("kind", ["harmful", "truncated", "list", "empty"])
def test_a_pickle_of_something_else_runs_nothing(tmp_path, kind):
    published = write(tmp_path, "cifar100", "python")
    target = tmp_path / "cifar-100-python"
    data = {
        "harmful": pickle.dumps(Harmful(tmp_path / "made"), 2),
        "truncated": (target / "train").read_bytes()[:-10],
        "list": pickle.dumps([1, 2]),
        "empty": b"",
    }[kind]
    (target / "train").write_bytes(data)
    with pytest.raises(ValueError, match=r"/train: (not a readable batch of CIFAR|expected the keys)"):
        load_cifar(resum(published, 1, target), tmp_path)
    assert not (tmp_path / "made").exists()


def test_the_pickles_of_these_tests_are_what_numpy_takes_for_arrays():
    """So that the files written here are those that were published, not merely what the reader expects."""
    images, labels = content("cifar10")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module of arrays has another name since
        loaded = pickle.load(io.BytesIO(batch(SETS["cifar10"], images, labels)), encoding="latin1")
    assert torch.equal(torch.from_numpy(loaded["data"]), images)
    assert loaded["labels"] == labels[:, 0].tolist()
