"""Predictions: pictures and arrays through the network of a run, and every file that cannot be one."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from test_cli import assert_one_line_error, run

from gunn_ext.training import Config, FakeConfig, load_data, load_run, train
from gunn_ext.training.prediction import fitted, read_image


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on images of three channels, eight pixels wide."""
    output = tmp_path_factory.mktemp("runs") / "run"
    fake = FakeConfig(shape=(3, 8, 8), classes=4, train_images=16, test_images=6)
    config = Config(data="fake", fake=fake, epochs=1, batch_size=8, device="cpu", output=str(output))
    train(config)
    return output, load_data(config, "cpu")


def save(folder, images):
    """The images as a .npy in each form, and as pictures without loss."""
    from PIL import Image

    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    np.save(folder / "0.npy", arrays[0])
    np.save(folder / "1.npy", images[1].numpy())
    (folder / "below").mkdir()
    Image.fromarray(arrays[2]).save(folder / "below" / "2.PNG")
    Image.fromarray(arrays[3]).save(folder / "below" / "3.bmp")


def test_files_and_folders_are_classified_as_the_test_images_are(finished, capsys, tmp_path):
    output, data = finished
    save(tmp_path, data.test.images)
    status, out, err = run(capsys, "predict", output, tmp_path / "0.npy", tmp_path / "1.npy", tmp_path / "below")
    assert (status, err) == (0, "")
    found = json.loads(out)
    names = ["0.npy", "1.npy", "below/2.PNG", "below/3.bmp"]
    assert [row["file"] for row in found] == [str(tmp_path / name) for name in names]
    with torch.no_grad():
        expected = load_run(output).model(data.normalize(data.test.images[:4])).softmax(1)
    for row, probabilities in zip(found, expected, strict=True):
        assert row["probabilities"] == pytest.approx(probabilities.tolist(), rel=1e-5)
        assert row["class"] == int(probabilities.argmax())
        assert row["probability"] == max(row["probabilities"])
    assert run(capsys, "predict", output, tmp_path, "--output", tmp_path / "p.json")[:2] == (0, "")
    assert [row["class"] for row in json.loads((tmp_path / "p.json").read_text())] == [row["class"] for row in found]


def test_other_sizes_are_scaled_to_cover_and_cut_from_the_middle():
    ramp = torch.arange(12.0).expand(1, 6, 12)
    assert fitted(ramp, 6, 6).tolist() == [[[3.0, 4.0, 5.0, 6.0, 7.0, 8.0]] * 6]
    assert fitted(ramp, 3, 3).shape == (1, 3, 3)
    torch.testing.assert_close(fitted(torch.full((3, 5, 9), 7.0), 8, 8), torch.full((3, 8, 8), 7.0))


def test_of_several_processes_one_writes(finished, capsys, tmp_path, monkeypatch):
    output, data = finished
    np.save(tmp_path / "0.npy", data.test.images[0].numpy())
    for rank, written in ((1, False), (0, True)):
        monkeypatch.setenv("RANK", str(rank))
        code, _, _ = run(capsys, "predict", output, tmp_path / "0.npy", f"--output={tmp_path / 'found.json'}")
        assert (code, (tmp_path / "found.json").exists()) == (0, written)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "none.png", "none.png: no such file or folder."),
        (lambda f: (f / "x.txt", (f / "x.txt").write_text("a"))[0], "x.txt: unknown kind of file; expected .npy .png"),
        (lambda f: (f / "x.png", (f / "x.png").write_bytes(b"\x89PNG"))[0], "x.png: cannot be decoded"),
        (lambda f: (f / "x.npy", (f / "x.npy").write_bytes(b"junk"))[0], "x.npy: not a .npy array"),
        (
            lambda f: (f / "x.npy", np.save(f / "x.npy", np.zeros((8, 8, 3))))[0],
            "x.npy: float64 of shape (8, 8, 3), expected uint8 of shape (H, W, 3) or (3, H, W).",
        ),
        (lambda f: (f / "x.npy", np.save(f / "x.npy", np.zeros((8, 8), np.uint8)))[0], "uint8 of shape (8, 8, 1)"),
        (lambda f: (f / "d", (f / "d").mkdir())[0], "d: no images in this folder; expected files ending in .npy"),
        (
            lambda f: (f / "x.npy", np.save(f / "x.npy", np.array([{}], object), allow_pickle=True))[0],
            "x.npy: not a .npy array",
        ),
    ],
)
def test_what_is_no_image_is_one_line(finished, capsys, tmp_path, make, message):
    assert_one_line_error(run(capsys, "predict", finished[0], make(tmp_path)), message)


def test_pictures_need_pillow_and_arrays_do_not(finished, capsys, tmp_path, monkeypatch):
    output, data = finished
    save(tmp_path, data.test.images)
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(capsys, "predict", output, tmp_path / "0.npy")[0] == 0
    outcome = run(capsys, "predict", output, tmp_path / "below")
    assert_one_line_error(outcome, "PIL.Image is needed here", "gunn-ext[imagenet]")


def test_pictures_become_what_the_network_takes(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((4, 5, 3), 100, np.uint8)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 1).tolist() == [[[100.0] * 5] * 4]
    with pytest.raises(ValueError, match="the network takes 2 channels, pictures have 1 or 3; give .npy files"):
        read_image(tmp_path / "x.png", 2)


def test_a_checkpoint_of_other_classes_than_the_data_is_told(finished, capsys, tmp_path):
    import shutil

    output = shutil.copytree(finished[0], tmp_path / "run")
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text.replace("classes: 4\n", "classes: 5\n"))
    before = sorted(os.listdir(output))
    assert_one_line_error(run(capsys, "eval", output), "for 4 classes and 3 channels, but the data set fake has 5")
    assert sorted(os.listdir(output)) == before


def test_what_is_trained_on_files_is_predicted_as_it_is_evaluated():
    ramp = torch.arange(16.0).expand(1, 8, 16)
    assert fitted(ramp, 4, 4, shorter=8).tolist() == [[[6.0, 7.0, 8.0, 9.0]] * 4]


def test_ten_views_are_for_data_from_files(finished, capsys):
    assert_one_line_error(
        run(capsys, "eval", finished[0], "--ten-crop"), "ten views are cut from files, data folder or"
    )


def test_ten_views_of_a_folder_are_averaged(tmp_path, capsys):
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for split, name, count in (("train", "a", 3), ("train", "b", 3), ("val", "a", 2), ("val", "b", 2)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(256, (12, 14, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = ["--data=folder", f"--data_path={tmp_path}/data", "--folder.image_size=8", "--folder.resize=10"]
    settings += ["--folder.workers=0", "--batch-size=2", "--epochs=1", "--device=cpu", f"--output={tmp_path}/run"]
    assert run(capsys, "train", *settings)[0] == 0
    plain, ten = (
        json.loads(run(capsys, "eval", tmp_path / "run", "--json", *more)[1]) for more in ([], ["--ten-crop"])
    )
    assert plain["count"] == ten["count"] == 4
    assert plain["loss"] != ten["loss"]
    trained = load_run(tmp_path / "run")
    images = sorted((tmp_path / "data" / "val").rglob("*.png"))
    status, out, _ = run(capsys, "predict", tmp_path / "run", *images)
    assert status == 0
    found = [row["probabilities"][0 if "/a/" in row["file"] else 1] for row in json.loads(out)]
    assert trained.image_shape == (3, 8, 8)
    assert -sum(torch.tensor(found).log().tolist()) / 4 == pytest.approx(plain["loss"], rel=1e-4)
