"""Image files: the transformations are torchvision's, batches depend on the seed alone, damaged files are named."""

import random

import pytest
import torch

from gunn_ext._optional import try_import
from gunn_ext.data import Augmentation, load_folder
from gunn_ext.data.folder import MEAN, STD
from gunn_ext.data.photo import (
    EIGENVALUES,
    EIGENVECTORS,
    change_colours,
    draw_colours,
    evaluation_views,
    random_box,
    training_view,
)

Image, no_pillow = try_import("PIL.Image")
pytestmark = pytest.mark.skipif(Image is None, reason=no_pillow)


@pytest.fixture(scope="module")
def transforms():
    """torchvision.transforms; where torchvision's operators do not fit this torch, with two of them declared."""
    if try_import("torchvision")[0] is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module, reason = try_import("torchvision")
        if module is None:
            pytest.skip(reason)
    return try_import("torchvision.transforms")[0]


def picture(width=60, height=40, seed=0):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes()).resize((width, height))


@pytest.fixture
def tree(tmp_path):
    """Two classes, seven training and five test images of many sizes, one of them grey and one with a palette."""
    for part, counts in (("train", {"cat": 4, "dog": 3}), ("val", {"cat": 3, "dog": 2})):
        for name, count in counts.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(40 + 7 * i, 50 - 5 * i, seed=i).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    picture().convert("L").save(tmp_path / "train" / "cat" / "0.jpg")
    picture().convert("P").save(tmp_path / "train" / "dog" / "1.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def small(path, **options):
    return load_folder(path, **{"image_size": 16, "resize": 20, "workers": 0} | options)


def epoch(data, seed=0, order=((0, 5, 3), (6, 1, 2)), mirror=True):
    generator = torch.Generator().manual_seed(seed)
    return list(data.training_batches(map(torch.tensor, order), Augmentation(mirror=mirror), generator))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (inputs, labels), (others, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(inputs, others)
        assert torch.equal(labels, other_labels)


# transformations ----------------------------------------------------------------------------------------------------


def test_the_training_view_is_a_resized_crop(transforms):
    image = picture()
    for seed in range(5):
        box = random_box(*image.size, random.Random(seed))
        ours = training_view(image, 24, random.Random(seed), mirror=False)
        left, top, right, low = box
        theirs = transforms.functional.resized_crop(image, top, left, low - top, right - left, [24, 24])
        assert torch.equal(ours, transforms.functional.pil_to_tensor(theirs))


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 61), (33, 33)])
def test_evaluation_views_are_resize_and_crops(transforms, width, height):
    image = picture(width, height)
    scaled = transforms.functional.pil_to_tensor(transforms.Resize(30)(image))
    assert torch.equal(evaluation_views(image, 30, 25, ten_crop=False), transforms.CenterCrop(25)(scaled))
    theirs = torch.stack(transforms.TenCrop(25)(scaled))
    # Both put the middle of the mirrored image last of the second five, after its corners.
    assert torch.equal(evaluation_views(image, 30, 25, ten_crop=True), theirs)


def test_random_boxes_are_of_the_areas_and_aspects_of_the_recipe():
    draw = random.Random(0)
    boxes = [random_box(400, 300, draw) for _ in range(2000)]
    areas = torch.tensor([(r - l) * (b - t) / 120_000 for l, t, r, b in boxes])  # noqa: E741
    aspects = torch.tensor([(r - l) / (b - t) for l, t, r, b in boxes])  # noqa: E741
    assert all(0 <= l < r <= 400 and 0 <= t < b <= 300 for l, t, r, b in boxes)  # noqa: E741
    assert 0.078 < areas.min() < 0.1
    assert areas.max() > 0.9
    assert 0.74 < aspects.min() < 0.77
    assert 1.3 < aspects.max() < 1.35


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))]
)
def test_where_no_box_fits_the_middle_is_taken(size, box):
    assert random_box(*size, random.Random(0)) == box


def test_mirroring_happens_half_the_time():
    image = picture(20, 20)
    pairs = [[training_view(image, 16, random.Random(s), mirror=m) for m in (False, True)] for s in range(200)]
    flipped = [torch.equal(b, a.flip(-1)) for a, b in pairs]
    assert all(f or torch.equal(a, b) for f, (a, b) in zip(flipped, pairs, strict=True))
    assert 75 < sum(flipped) < 125


def test_colours_change_as_in_torchvision(transforms):
    functional = transforms.functional
    changes = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    images = torch.rand(12, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([draw_colours(random.Random(i)) for i in range(12)])
    ours = change_colours(images, draws, 0.4, 0.0)
    assert len({tuple(order) for order in draws[:, 3:6].argsort(1).tolist()}) > 3
    for image, draw, out in zip(images, draws, ours, strict=True):
        for which in draw[3:6].argsort().tolist():
            image = changes[which](image, 1 + 0.4 * float(draw[which]))
        assert (out - image).abs().max() < 1e-6


def test_lighting_adds_multiples_of_the_principal_components():
    images, draws = torch.zeros(2, 3, 2, 2), torch.zeros(2, 9)
    draws[0, 6:] = torch.tensor([1.0, 2.0, -3.0])
    out = change_colours(images, draws, 0.0, 0.1)
    for channel in range(3):
        weights = zip((1.0, 2.0, -3.0), EIGENVALUES, EIGENVECTORS[channel], strict=True)
        expected = sum(0.1 * a * b * c for a, b, c in weights)
        assert (out[0, channel] - expected).abs().max() < 1e-7
    assert not out[1].any()
    assert torch.equal(change_colours(images + 0.5, draws, 0.0, 0.0), images + 0.5)


def test_the_principal_components_are_orthonormal():
    vectors = torch.tensor(EIGENVECTORS)
    assert (vectors.T @ vectors - torch.eye(3)).abs().max() < 1e-3


# data sets ----------------------------------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(tree):
    data = small(tree)
    assert (len(data.train), len(data.test), data.classes, data.class_names) == (7, 5, 2, ("cat", "dog"))
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert [file.name for file in data.train.files] == ["0.jpg", "1.png", "2.jpg", "3.png", "0.jpg", "1.png", "2.jpg"]
    assert (data.image_shape, data.mirror) == ((3, 16, 16), True)
    assert data.train.take(torch.tensor([6, 0])).labels.tolist() == [1, 0]


def test_evaluation_sees_every_image_once_in_order(tree):
    data = small(tree)
    batches = list(data.evaluation_batches(data.test, 2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1]
    view = evaluation_views(Image.open(data.test.files[1]).convert("RGB"), 20, 16, ten_crop=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(batches[0][0][1], (view - mean) / std)


def test_ten_crop_yields_ten_views_of_each_image(tree):
    data = small(tree, ten_crop=True)
    inputs = torch.cat([inputs for inputs, _ in data.evaluation_batches(data.test, 3)])
    assert inputs.shape == (5, 10, 3, 16, 16)
    plain = torch.cat([i for i, _ in small(tree).evaluation_batches(data.test, 3)])
    assert torch.equal(inputs[:, 4], plain)
    assert torch.equal(inputs[:, 5], inputs[:, 1].flip(-1))


def test_batches_do_not_depend_on_the_number_of_workers_nor_on_the_global_random_state(tree):
    plain = epoch(small(tree))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert_same(plain, epoch(small(tree, workers=2)))
    assert torch.equal(state, torch.get_rng_state())
    assert [labels.tolist() for _, labels in plain] == [[0, 1, 0], [1, 0, 0]]


def test_an_image_depends_on_the_seed_and_its_index_alone(tree):
    data = small(tree)
    first, other = epoch(data), epoch(data, order=((5,), (0, 3)))
    assert torch.equal(first[0][0][1], other[0][0][0])
    assert torch.equal(first[0][0][[0, 2]], other[1][0])
    assert not torch.equal(first[0][0], epoch(data, seed=1)[0][0])


def test_without_jitter_and_lighting_only_the_crop_is_random(tree):
    data = small(tree, jitter=0.0, lighting=0.0)
    inputs = epoch(data, mirror=False)[0][0]
    generator = torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    image = Image.open(data.train.files[5]).convert("RGB")
    view = training_view(image, 16, random.Random(f"{seed} 5"), mirror=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert (inputs[1] - (view - mean) / std).abs().max() < 1e-5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "no image", "empty"])
def test_a_damaged_image_is_named(tree, kind, workers):
    file = tree / "train" / "dog" / "2.jpg"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "no image": b"text", "empty": b""}[kind])
    with pytest.raises(ValueError, match=f"^{file}: cannot be decoded .*the file is damaged or no image.$"):
        epoch(small(tree, workers=workers))


def test_missing_folders_are_named(tree):
    with pytest.raises(FileNotFoundError, match="expected the folders train and val .or test.* --data_path"):
        small(tree / "train")
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_img_train.tar.* from https://image-net.org.* downloaded"):
        small(tree / "train", name="imagenet")
    (tree / "train" / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match="train/eel holds no images"):
        small(tree)


def test_classes_that_do_not_fit_are_refused(tree):
    with pytest.raises(ValueError, match=r"holds 2 folders \(cat, dog …\), expected the 1,000 of ImageNet"):
        small(tree, name="imagenet")
    (tree / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match="val holds the class 'emu', which the training images lack"):
        small(tree)


def test_imagenet_has_a_thousand_classes(tmp_path):
    for part in ("train", "val"):
        for i in range(1000):
            folder = tmp_path / part / f"n{i:08d}"
            folder.mkdir(parents=True)
            (folder / "0.JPEG").touch()
    data = small(tmp_path, name="imagenet")
    assert (data.name, data.classes, len(data.train), len(data.test)) == ("imagenet", 1000, 1000, 1000)
