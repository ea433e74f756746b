"""Folders of small images, as users have them."""

from PIL import Image


def write_image(path, colour, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def write_domain(folder, classes=("red", "blue"), train=4, test=2, test_part="test"):
    """<folder>/{train,<test_part>}/<class>/<number>.png, every image of one colour."""
    for part, count in (("train", train), (test_part, test)):
        for name in classes:
            for number in range(count):
                colour = {"red": (250 - number, 0, 0), "blue": (0, 0, 250 - number)}
                write_image(
                    folder / part / name / f"{number}.png", colour.get(name, (9, number, 9))
                )
    return folder
