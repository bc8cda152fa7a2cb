"""The data sets as settings ask for them: bad settings are refused by name, files are found, runs are made of them."""

import itertools
import sys

import pytest
import torch

from gunn_ext import cli
from gunn_ext._optional import try_import
from gunn_ext.training import (
    CifarConfig,
    Config,
    ConfigError,
    FakeConfig,
    FolderConfig,
    ShapesConfig,
    ValidationConfig,
    evaluate_run,
    load_data,
    train,
)
from gunn_ext.training.config import differences
from gunn_ext.training.evaluation import evaluate
from gunn_ext.training.run_directory import RunDirectory
from gunn_ext.training.runs import load_run


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShapesConfig(classes=41), "shapes.classes must be from 2 to 40, got 41."),
        (lambda: ShapesConfig(difficulty=2.0), "shapes.difficulty must be an integer, got 2.0."),
        (lambda: ShapesConfig(train_images=0), "shapes.train_images must be from 1 to 4294967295, got 0."),
        (lambda: CifarConfig(coarse=1), "cifar.coarse must be true or false, got 1."),
        (lambda: Config(data="cifar10", cifar=CifarConfig(coarse=True)), "cifar.coarse belongs to data=cifar100, got"),
        (lambda: Config(data="arrays"), "data=arrays needs data_path: a file .npz, .h5 or .hdf5, or a folder of"),
        (lambda: FolderConfig(resize=200), "folder.resize (200) must not be below folder.image_size (224)"),
        (lambda: FolderConfig(jitter=1.5), "folder.jitter must be a finite number at least 0 and at most 1, got 1.5."),
        (lambda: FolderConfig(workers=-1), "folder.workers must be at least 0, got -1."),
        (lambda: FolderConfig(ten_crop="yes"), "folder.ten_crop must be true or false, got 'yes'."),
        (
            lambda: ValidationConfig(size=1.5),
            "validation.size must be a share below 1 or a whole number",
        ),
        (lambda: ValidationConfig(size=-1), "validation.size must be a finite number at least 0, got -1."),
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


def test_a_validation_split_is_held_out_where_asked_for():
    data = load_data(Config(validation=ValidationConfig(size=0.1)), "cpu")
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 144, 360)
    assert load_data(Config(), "cpu").validation is None


def test_the_best_network_is_chosen_on_the_validation_split_and_tested_once(tmp_path):
    fake = FakeConfig(shape=(1, 8, 8), classes=3, train_images=40, test_images=9)
    config = Config(data="fake", fake=fake, validation=ValidationConfig(size=10), epochs=3, batch_size=10,
                    device="cpu", output=str(tmp_path / "run"))  # fmt: skip
    result = train(config)
    records = RunDirectory(tmp_path / "run").read_metrics()
    accuracies = [record["validation_accuracy"] for record in records]
    assert [record["test_accuracy"] for record in records] == [None] * 3
    assert (result.best_accuracy, result.best_epoch) == (max(accuracies), accuracies.index(max(accuracies)))
    best = evaluate_run(tmp_path / "run", "best", "cpu")
    assert (result.test_accuracy, result.test_loss, best.count) == (best.accuracy, best.loss, 9)
    assert (result.validation_count, result.test_count) == (10, 9)
    assert "chosen on 10 validation images: best" in result.describe()
    model, data = load_run(tmp_path / "run", "best").model, load_data(config, "cpu")
    again = evaluate(model, data.evaluation_batches(data.validation, 4))
    assert again.accuracy == result.best_accuracy
    assert train(config, resume=True) == result


def test_image_files_are_trained_on_and_evaluated(tmp_path):
    image, reason = try_import("PIL.Image")
    if image is None:
        pytest.skip(reason)
    for part, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(4):
            image.new("RGB", (20, 24), (60 * i, 200 * (name == "a"), 99)).save(tmp_path / part / name / f"{i}.png")
    files = FolderConfig(image_size=16, resize=18, workers=0, ten_crop=True)
    config = Config(data="folder", data_path=str(tmp_path), folder=files, batch_size=4, epochs=1, device="cpu",
                    output=str(tmp_path / "run"), validation=ValidationConfig(size=2))  # fmt: skip
    assert config.resolved().augment.crop_padding == 0
    data = load_data(config, "cpu")
    assert (len(data.train), len(data.validation), len(data.test), data.image_shape) == (6, 2, 4 * 2, (3, 16, 16))
    result = train(config)
    assert result.test_count == 8
    views = [(inputs, labels) for inputs, labels in data.evaluation_batches(data.test, 8)]
    model = load_run(tmp_path / "run", "best").model
    with torch.no_grad():
        softmax = torch.stack([model(views[0][0][:, i]).softmax(1) for i in range(10)]).mean(0)
    assert result.test_accuracy == (softmax.argmax(1) == views[0][1]).double().mean()


def test_where_the_data_lie_and_who_decodes_is_no_difference_between_runs():
    here = Config(data="folder", data_path="a", folder=FolderConfig(workers=1))
    there = Config(data="folder", data_path="b", folder=FolderConfig(workers=2))
    assert not differences(here, there)
    assert differences(Config(), Config(validation=ValidationConfig(size=9))) == {"validation.size": (0.0, 9)}


def test_arrays_are_read_and_not_augmented_unless_asked(tmp_path):
    numpy = pytest.importorskip("numpy")
    images, labels = numpy.zeros((4, 8, 8), "uint8"), numpy.arange(4) % 2
    numpy.savez(tmp_path / "a.npz", X_train=images, Y_train=labels, X_test=images, Y_test=labels)
    config = Config(data="arrays", data_path=str(tmp_path / "a.npz")).resolved()
    assert (config.augment.mirror, config.augment.crop_padding, config.image_shape) == (False, 0, None)
    assert load_data(config, "cpu").image_shape == (1, 8, 8)


def test_cifar_is_looked_for_in_the_folder_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}: no CIFAR-100 here"):
        load_data(Config(data="cifar100", data_path=str(tmp_path)), "cpu")


def test_a_missing_package_is_a_matter_of_settings(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").touch()
    with pytest.raises(ConfigError, match=r"pip install 'gunn-ext\[hdf5\]'"):
        load_data(Config(data="arrays", data_path=str(tmp_path / "a.h5")), "cpu")


def test_the_command_says_what_is_missing_in_one_line_and_makes_nothing(tmp_path, capsys):
    arguments = ["train", "--data=cifar10", f"--data-path={tmp_path}", f"--output={tmp_path / 'run'}"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gunn: error: {tmp_path}: no CIFAR-10 here. Fetch cifar-10-binary.tar.gz or")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
