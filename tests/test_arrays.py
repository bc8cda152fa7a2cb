"""Arrays of one's own: .npz, .npy and HDF5 files in the shapes and dtypes people have, and those that are wrong."""

import sys

import pytest
import torch

from gunn_ext._optional import require, try_import
from gunn_ext.data import load_arrays

numpy = pytest.importorskip("numpy")
h5py, no_h5py = try_import("h5py")
KINDS = ["npz", "npy", pytest.param("h5", marks=pytest.mark.skipif(h5py is None, reason=no_h5py))]


def content(train=6, test=3, shape=(5, 4, 3)):
    draw = numpy.random.default_rng(0)
    return {
        "X_train": draw.integers(256, size=(train, *shape), dtype=numpy.uint8),
        "Y_train": numpy.arange(train) % 3,
        "X_test": draw.integers(256, size=(test, *shape), dtype=numpy.uint8),
        "Y_test": numpy.arange(test) % 3,
    }


def write(folder, kind, arrays):
    path = folder / f"mine.{kind}"
    if kind == "npz":
        numpy.savez_compressed(path, **arrays)
    elif kind == "npy":
        path.mkdir()
        for name, array in arrays.items():
            numpy.save(path / f"{name}.npy", array)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_all_files_hold_the_same_images(tmp_path, kind):
    arrays = content()
    data = load_arrays(write(tmp_path, kind, arrays))
    assert (data.classes, data.image_shape, data.mirror, data.name) == (3, (3, 5, 4), False, "mine")
    assert torch.equal(data.train.images, torch.from_numpy(arrays["X_train"]).permute(0, 3, 1, 2))
    assert torch.equal(data.test.images, torch.from_numpy(arrays["X_test"]).permute(0, 3, 1, 2))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 1, 2])
    assert data.train.images.is_contiguous()


IMAGES = content()["X_train"]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 3, 1, 2).copy(),
        IMAGES.astype("int64"),
        IMAGES.astype("float32"),
        IMAGES.astype("float32") / numpy.float32(255),
        IMAGES / 255,
    ],
    ids=["NCHW", "int64", "float32", "255ths float32", "255ths float64"],
)
def test_layouts_and_dtypes_mean_the_same(tmp_path, images):
    data = load_arrays(write(tmp_path, "npz", content() | {"X_train": images}))
    assert torch.equal(data.train.images, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))


def test_grey_images_need_no_channel(tmp_path):
    arrays = content(shape=(5, 4))
    data = load_arrays(write(tmp_path, "npz", arrays))
    assert data.image_shape == (1, 5, 4)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(arrays["X_train"]))


@pytest.mark.parametrize(
    "labels",
    [numpy.arange(6)[:, None] % 3, numpy.eye(3)[numpy.arange(6) % 3], numpy.array([0, 1, 2, 0, 1, 2], "float32"),
     numpy.array([0, 1, 2, 0, 1, 2], "uint8")],
    ids=["column", "one-hot", "float", "uint8"],
)  # fmt: skip
def test_labels_may_be_a_column_or_one_hot(tmp_path, labels):
    data = load_arrays(write(tmp_path, "npz", content() | {"Y_train": labels}))
    assert (data.train.labels.tolist(), data.classes) == ([0, 1, 2, 0, 1, 2], 3)


def test_a_one_hot_row_counts_classes_that_do_not_occur(tmp_path):
    assert load_arrays(write(tmp_path, "npz", content() | {"Y_test": numpy.eye(5)[:3]})).classes == 5


def test_names_may_be_written_small_and_others_are_left_alone(tmp_path):
    arrays = {name.lower(): array for name, array in content().items()} | {"notes": numpy.arange(2)}
    assert len(load_arrays(write(tmp_path, "npz", arrays)).train) == 6


@pytest.mark.skipif(h5py is None, reason=no_h5py)
def test_hdf5_of_the_other_byte_order_is_read(tmp_path):
    arrays = content()
    arrays["Y_train"] = arrays["Y_train"].astype(">i4")
    assert load_arrays(write(tmp_path, "h5", arrays)).train.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X_train": None}, r"holds no X_train, but Y_train, X_test, Y_test; expected X_train, Y_train"),
        ({"X_train": IMAGES[:5]}, "X_train holds 5 images, but Y_train 6 labels"),
        ({"X_train": IMAGES[0, 0]}, r"X_train has shape \(4, 3\), expected images \(n, H, W, C\)"),
        ({"X_train": IMAGES[..., :2]}, r"shape \(6, 5, 4, 2\): either the second or the last size must be 1 or 3"),
        ({"X_train": IMAGES[:, :3]}, r"shape \(6, 3, 4, 3\): either"),
        ({"X_train": IMAGES[:, :4]}, "both must have the same shape"),
        ({"X_train": IMAGES - 128.0}, r"X_train runs from -\d+ to 12\d .*store images as they were before normal"),
        ({"X_train": IMAGES / 700}, "in steps finer than 1/255"),
        ({"X_train": IMAGES + 0.5}, "expected whole numbers 0 to 255"),
        ({"X_train": IMAGES.astype("int32") * 2}, "expected whole numbers 0 to 255"),
        ({"X_train": IMAGES > 3}, "X_train is of torch.bool"),
        ({"X_train": IMAGES.astype("float32") * numpy.float32("nan")}, "X_train runs from nan to nan"),
        ({"Y_train": numpy.array([0, 1, 2, 0, 1, 2.5])}, "Y_train of shape .6,. and torch.float64 holds no labels"),
        ({"Y_train": numpy.array([0, 1, 2, 0, 1, -1])}, "Y_train holds the label -1; labels count from 0"),
        ({"Y_train": numpy.ones((6, 3))}, "is not one-hot: a row must hold one 1"),
        ({"Y_train": numpy.eye(6) * 2}, "is not one-hot"),
        ({"Y_train": numpy.array(["a"] * 6)}, "dtype '<U1', Fortran order False; expected C order"),
        ({"Y_train": numpy.array([{}] * 6)}, "dtype '|O'"),
    ],
)
def test_what_is_no_data_set_is_refused_by_name(tmp_path, changes, message):
    arrays = {name: array for name, array in (content() | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message) as error:
        load_arrays(write(tmp_path, "npz", arrays))
    assert "mine" in str(error.value)


@pytest.mark.parametrize("kind", ["npz", "h5", "npy"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    if kind == "h5" and h5py is None:
        pytest.skip(no_h5py)
    path = write(tmp_path, kind, content())
    file = path / "X_train.npy" if kind == "npy" else path
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path}.*(not a readable|bytes of data, expected 360; the file is damaged)"):
        load_arrays(path)


def test_a_damaged_header_is_refused(tmp_path):
    path = write(tmp_path, "npy", content())
    file = path / "X_train.npy"
    file.write_bytes(file.read_bytes().replace(b"'shape'", b"'shope'"))
    with pytest.raises(ValueError, match="X_train.npy: its header is not that of a .npy file"):
        load_arrays(path)


@pytest.mark.skipif(h5py is None, reason=no_h5py)
def test_hdf5_text_is_no_array(tmp_path):
    with pytest.raises(ValueError, match="mine.h5: Y_train is no array of numbers"):
        load_arrays(write(tmp_path, "h5", content() | {"Y_train": [b"a"] * 6}))


@pytest.mark.parametrize(("name", "kind"), [("no.npz", FileNotFoundError), ("mine.txt", ValueError)])
def test_other_files_are_refused(tmp_path, name, kind):
    (tmp_path / "mine.txt").write_text("no arrays")
    with pytest.raises(kind, match=r"file .npz, .h5 or .hdf5, or a folder of files .npy"):
        load_arrays(tmp_path / name)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no X_train and no Y_train and no X_test and no Y_test, but nothing"):
        load_arrays(tmp_path)


# optional packages --------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_or_broken_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "mine.h5").touch()
    with pytest.raises(RuntimeError, match=r"h5py is needed .*cannot be imported.*pip install 'gunn-ext\[hdf5\]'"):
        load_arrays(tmp_path / "mine.h5")
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator does\\nnot exist')")
    monkeypatch.syspath_prepend(tmp_path)
    assert try_import("broken_package") == (None, "RuntimeError: operator does not exist")
    with pytest.raises(RuntimeError, match=r"operator does not exist\); pip install 'gunn-ext\[imagenet\]'"):
        require("broken_package", "imagenet")
    assert try_import("json") == (sys.modules["json"], "")
