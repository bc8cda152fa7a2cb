"""The data sets as settings ask for them: bad settings are refused by name, files are found, runs are made of them."""

import pytest

from gunn_ext.training import CifarConfig, Config, ConfigError, ShapesConfig, load_data
from gunn_ext.training.config import differences


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShapesConfig(classes=41), "shapes.classes must be from 2 to 40, got 41."),
        (lambda: ShapesConfig(difficulty=2.0), "shapes.difficulty must be an integer, got 2.0."),
        (lambda: ShapesConfig(train_images=0), "shapes.train_images must be from 1 to 4294967295, got 0."),
        (lambda: CifarConfig(coarse=1), "cifar.coarse must be true or false, got 1."),
        (lambda: Config(data="cifar10", cifar=CifarConfig(coarse=True)), "cifar.coarse belongs to data=cifar100, got"),
        (lambda: Config(data="arrays"), "data=arrays needs data_path: a file .npz, .h5 or .hdf5, or a folder of"),
        (lambda: Config(data_path=""), "data_path must be a text, got ''."),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


def test_shapes_are_made_as_the_settings_ask():
    config = Config(data="shapes", shapes=ShapesConfig(classes=4, train_images=40, test_images=8, seed=3))
    data = load_data(config, "cpu")
    assert (len(data.train), len(data.test), data.classes) == (40, 8, 4)
    assert config.resolved().augment.crop_padding == 4
    assert config.resolved().augment.mirror


def test_where_the_data_lie_is_no_difference_between_runs():
    assert not differences(Config(data="cifar10", data_path="a"), Config(data="cifar10", data_path="b"))


def test_arrays_are_read_and_not_augmented_unless_asked(tmp_path):
    numpy = pytest.importorskip("numpy")
    images, labels = numpy.zeros((4, 8, 8), "uint8"), numpy.arange(4) % 2
    numpy.savez(tmp_path / "a.npz", X_train=images, Y_train=labels, X_test=images, Y_test=labels)
    config = Config(data="arrays", data_path=str(tmp_path / "a.npz")).resolved()
    assert (config.augment.mirror, config.augment.crop_padding, config.image_shape) == (False, 0, None)
    assert load_data(config, "cpu").image_shape == (1, 8, 8)


def test_cifar_is_looked_for_in_the_folder_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no CIFAR-100 here"):
        load_data(Config(data="cifar100", data_path=str(tmp_path)), "cpu")
