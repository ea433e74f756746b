"""Protocols on miniature folders: which part is cut how, and what is missing."""

import pytest
from helpers.images import write_domain
from torch import nn


def load(name, root, wanted=()):
    from comparison.backbones import Backbone
    from comparison.protocols import load_protocol

    return load_protocol(name, root, Backbone("net", nn.Module, (0.5,) * 3, (0.5,) * 3), wanted)


SKETCH = ["cubs_cropped", "stanford_cars_cropped", "flowers", "wikiart", "sketches"]
DECATHLON = (
    "aircraft cifar100 daimlerpedcls dtd gtsrb imagenet12 omniglot svhn ucf101 vgg-flowers"
).split()


@pytest.mark.parametrize(
    ("name", "domains", "part", "size"),
    [("imagenet-to-sketch", SKETCH, "test", 224), ("visual-decathlon", DECATHLON, "val", 64)],
)
def test_a_protocol(tmp_path, name, domains, part, size):
    for domain in domains:
        write_domain(tmp_path / domain, test_part=part, train=2, test=1)
    found = load(name, tmp_path)
    assert [domain.name for domain in found] == domains
    for domain in found:
        assert (len(domain.train), len(domain.test)) == (4, 2)
        for data in (domain.train, domain.plain, domain.test):
            image, label = data[1]
            assert image.shape == (3, size, size)
            assert label == data.labels[1]
        assert (domain.test[0][0] == domain.test[0][0]).all()
    assert [d.name for d in load(name, tmp_path, domains[1:2])] == domains[1:2]


def test_training_images_vary_and_those_that_choose_do_not(tmp_path):
    import torch
    from comparison.protocols import DECATHLON, SKETCH
    from PIL import Image

    def cut(compose, seed):
        torch.manual_seed(seed)
        return compose(image).tobytes()

    image = Image.radial_gradient("L").convert("RGB")
    image.putpixel((3, 3), (255, 0, 0))
    image = image.resize((90, 120)).rotate(20)
    for cuts in (SKETCH["flowers"], DECATHLON["dtd"], DECATHLON["svhn"]):
        assert len({cut(cuts.train, seed) for seed in range(8)}) > 1
        assert len({cut(cuts.test, seed) for seed in range(4)}) == 1


def test_signs_and_characters_are_not_mirrored():
    from comparison.protocols import DECATHLON
    from torchvision.transforms import RandomHorizontalFlip

    mirrored = {
        name
        for name, cut in DECATHLON.items()
        if any(isinstance(step, RandomHorizontalFlip) for step in cut.train.transforms)
    }
    assert {*DECATHLON} - mirrored == {"gtsrb", "omniglot", "svhn"}


def test_what_is_missing_is_named_with_its_place(tmp_path):
    from comparison.input_errors import InputError

    write_domain(tmp_path / "flowers")
    with pytest.raises(InputError, match=r"put them into <class> folders of .*cubs_cropped/train"):
        load("imagenet-to-sketch", tmp_path)
    assert len(load("imagenet-to-sketch", tmp_path, ["flowers"])) == 1
    with pytest.raises(InputError, match=r"has no domain cats: it has cubs_cropped"):
        load("imagenet-to-sketch", tmp_path, ["cats"])


def test_a_corrupt_image_of_a_protocol_is_named_when_it_is_read(tmp_path):
    from comparison.input_errors import InputError

    folder = write_domain(tmp_path / "flowers")
    (folder / "train" / "red" / "1.png").write_bytes(b"x")
    (domain,) = load("imagenet-to-sketch", tmp_path, ["flowers"])
    with pytest.raises(InputError, match=r"1\.png cannot be read"):
        list(domain.train)
