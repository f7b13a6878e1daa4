import numpy as np
from PIL import Image

from raptor_hf.tasks.pictures import _COLOURS, _class_colours, plot_class_maps


def test_the_largest_of_many_classes_have_colours_of_their_own():
    """Of 150 classes the pictures hold 24: the 20 largest are told apart, the rest is grey."""
    rows = [np.full((1, 30 - label), 6 * label) for label in range(24)]
    flat = np.concatenate([row.ravel() for row in rows] + [np.full(99, 255)])
    options, shown = _class_colours(150, [flat[:200], flat[200:]])
    assert shown == [6 * label for label in range(20)]
    colours = options["cmap"].colors
    assert np.array_equal(colours[shown], _COLOURS)
    assert len({tuple(colour) for colour in colours[shown]}) == 20
    others = np.delete(colours, shown, axis=0)
    assert np.array_equal(others, np.full((130, 3), 0.7))


def test_a_picture_of_maps_is_written(tmp_path):
    maps = {"truth": [np.array([[0, 255], [3, 3]])], "model": [np.array([[0, 0], [3, 7]])]}
    images = [Image.new("RGB", (2, 2))]
    plot_class_maps(images, maps, [f"thing {n}" for n in range(9)], tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
