"""Domains out of folders: what is read, how it is split, and what is said about bad ones."""

import shutil

import pytest
import torch
from helpers.images import write_domain, write_image
from torch import nn


def backbone(mean=(0.5,) * 3, std=(0.25,) * 3):
    from comparison.backbones import Backbone

    return Backbone("net", nn.Module, mean, std)


def read(root, **options):
    from comparison.images import folders

    return folders(root, backbone(), 8, **options)


def refused(root, words, **options):
    from comparison.input_errors import InputError

    with pytest.raises(InputError, match=words) as caught:
        read(root, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_of_domains(tmp_path):
    write_domain(tmp_path / "b")
    write_domain(tmp_path / "a", classes=("red", "blue", "green"), train=3, test=1)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / "train" / "red" / "notes.txt").write_text("no image")
    one, two = read(tmp_path)
    assert (one.name, two.name) == ("a", "b")
    assert one.classes == ("blue", "green", "red")
    assert (len(one.train), len(one.test), len(two.train), len(two.test)) == (9, 3, 8, 4)
    assert one.train_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    image, label = two.test[0]
    assert image.shape == (3, 8, 8)
    assert label == 0
    expected = (torch.tensor([0, 0, 250]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(image[:, 4, 4], expected)
    assert [d.name for d in read(tmp_path, wanted=["b"])] == ["b"]


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "gif", "tiff", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_image_that_pillow_opens(tmp_path, kind, mode):
    folder = write_domain(tmp_path / "a")
    write_image(folder / "test" / "red" / f"more.{kind}", (200, 10, 10), (40, 9), mode)
    (domain,) = read(tmp_path)
    assert len(domain.test) == 5
    assert all(image.shape == (3, 8, 8) for image, _ in domain.test)


def test_a_corrupt_image(tmp_path):
    folder = write_domain(tmp_path / "a")
    whole = (folder / "train" / "red" / "1.png").read_bytes()
    for bad in (b"", b"no image", whole[: len(whole) // 2]):
        (folder / "train" / "red" / "1.png").write_bytes(bad)
        refused(
            tmp_path, r"train/red/1\.png cannot be read as an image .*: mend it or take it away"
        )


def test_empty_and_missing_folders(tmp_path):
    refused(tmp_path / "none", "none: there is no such folder")
    refused(tmp_path, r"holds no domain: images must lie in .*/<domain>/train/<class>/")
    folder = write_domain(tmp_path / "a")
    refused(tmp_path, "has no domain c: it has a", wanted=["c"])
    for part in ("train", "test"):
        (folder / part / "green").mkdir()
    refused(tmp_path, r"No image lies in .*a/train/green, .*a/test/green: add images of this class")
    shutil.rmtree(folder / "test")
    refused(tmp_path, r"a/test is missing: put images into")


def test_classes_that_only_one_part_has(tmp_path):
    folder = write_domain(tmp_path / "a")
    write_image(folder / "test" / "green" / "0.png", (0, 9, 0))
    refused(tmp_path, r"a/test has classes that .*a/train lacks \(green\): add training images")
    shutil.rmtree(folder / "test" / "green")
    write_image(folder / "train" / "green" / "0.png", (0, 9, 0))
    refused(tmp_path, r"a/train has classes that .*a/test lacks \(green\): add test images")


def test_too_few_classes_or_images(tmp_path):
    write_domain(tmp_path / "a", classes=("red",))
    refused(tmp_path, r"a has 1 class\(es\): at least 2 are needed")
    write_domain(tmp_path / "a", train=1, classes=("red", "blue"))
    refused(tmp_path, r"a/train has a single image of blue: at least 2")


def test_unequal_classes_keep_their_shares():
    from comparison.sampling import at_most, split

    labels = torch.tensor([0] * 40 + [1] * 8 + [2] * 2 + [3])
    first, second = split(labels, 0.25, seed=0)
    assert sorted(first + second) == list(range(51))
    assert labels[second].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert split(labels, 0.25, seed=0) == (first, second)
    assert split(labels, 0.25, seed=1) != (first, second)
    assert labels[at_most(labels, 24, 0)].bincount().tolist() == [19, 4, 1, 1]
    assert at_most(labels, None, 0) == at_most(labels, 99, 0) == list(range(51))


def test_rates_are_chosen_on_training_images_alone(tmp_path):
    write_domain(tmp_path / "a", train=8, test=3)
    (domain,) = read(tmp_path)
    part = domain.limited(8, 4).validating(0.25)
    assert (len(part.train), len(part.test)) == (6, 2)
    assert part.test_labels.tolist() == [0, 1]
    trained, tested = ({tuple(x[:, 0, 0].tolist()) for x, _ in d} for d in (part.train, part.test))
    assert not trained & tested
    assert trained | tested <= {tuple(x[:, 0, 0].tolist()) for x, _ in domain.train}
    assert [label for _, label in part.test] == part.test_labels.tolist()


def test_images_that_come_with_packages():
    from comparison.images import packaged
    from comparison.input_errors import InputError
    from datasets import load_domain

    (faces,) = packaged(backbone(std=(0.25,) * 3), 16, ["faces"])
    expected = load_domain("faces", 16).test.tensors[0] * 2  # which is for a spread of 0.5
    torch.testing.assert_close(faces.test[3][0], expected[3])
    with pytest.raises(InputError, match="No domain cats comes with packages: there are digits"):
        packaged(backbone(), 16, ["cats"])
