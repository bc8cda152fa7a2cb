"""Draws docs/shapes.png: two images of each class of the rendered data set. Needs Pillow."""

from pathlib import Path

from PIL import Image

from gunn_ext.data import make_shapes
from gunn_ext.data.shapes import SIZE

ROWS, COLUMNS, ZOOM = 8, 10, 2

if __name__ == "__main__":
    images = make_shapes(train_images=ROWS * COLUMNS, test_images=0).train.images
    grid = images.view(ROWS, COLUMNS, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(ROWS * SIZE, COLUMNS * SIZE, 3)
    picture = Image.frombytes("RGB", (COLUMNS * SIZE, ROWS * SIZE), grid.contiguous().numpy().tobytes())
    picture = picture.resize((ZOOM * picture.width, ZOOM * picture.height), Image.Resampling.NEAREST)
    picture.quantize(128).save(Path(__file__).parents[1] / "docs" / "shapes.png", optimize=True)
