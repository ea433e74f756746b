"""What a domain file fits: backbone, architecture, config and plan."""

import pytest
import torch
from fixtures import v1

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert
from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.files.domain_file import read_domain, write_domain


@pytest.fixture
def learned(tmp_path):
    """A model with a domain of random values, and the domain's file."""
    model = convert(v1.network(), v1.CONFIG)
    model.add_domain("a", 3, class_names=["rose", "tulip", "lily"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.domain("a").parameters():
            parameter.normal_(generator=generator)
    model.save_domain("a", tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def scores_of(model, **place):
    model.eval().set_domain("a")
    with torch.no_grad():
        return model(v1.images().to(**place))


def does_not_fit(path, network, config=v1.CONFIG):
    """The message of the refusal, which must leave the model as it was."""
    fresh = convert(network, config)
    with pytest.raises(CheckpointError) as caught:
        fresh.load_domain(path)
    assert fresh.domains == []
    message = str(caught.value)
    assert message.startswith(f"The domain file {str(path)!r} does not fit this model: ")
    return message


PLACES = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
    {"memory_format": torch.channels_last},
    pytest.param(
        {"device": "cuda"},
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_freshly_made_model_computes_the_same_bits_everywhere(learned, place):
    model, path = learned
    fresh = convert(v1.network(), v1.CONFIG)
    fresh.load_domain(path)
    expected = scores_of(model.to(**place), **place)
    assert torch.equal(scores_of(fresh.to(**place), **place), expected)
    late = convert(v1.network(), v1.CONFIG).to(**place)  # moved, then loaded
    late.load_domain(path)
    assert torch.equal(scores_of(late, **place), expected)
    again = path.with_name("again.safetensors")
    late.save_domain("a", again)  # as it is there
    home = convert(v1.network(), v1.CONFIG).to(**place)
    home.load_domain(again)
    assert torch.equal(scores_of(home, **place), expected)


def test_a_backbone_that_was_converted_in_bfloat16(learned, tmp_path):
    _, path = learned
    network = v1.network().bfloat16()
    with torch.no_grad():
        network[0].weight.mul_(1.01)  # no longer a value of both types
    model = convert(network, v1.CONFIG)
    model.add_domain("a", 3)
    model.save_domain("a", tmp_path / "half.safetensors")
    fresh = convert(network, v1.CONFIG)
    fresh.load_domain(tmp_path / "half.safetensors")
    place = {"dtype": torch.bfloat16}
    assert torch.equal(scores_of(fresh, **place), scores_of(model, **place))
    message = does_not_fit(path, v1.network().bfloat16())
    assert "The architecture is the same, the weights differ (rounded to another" in message


def test_other_weights_are_named(learned):
    network = v1.network()
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1
    message = does_not_fit(learned[1], network)
    assert "It was learned on another backbone (Sequential, fingerprint" in message
    assert "The architecture is the same, the weights differ" in message


def test_another_architecture_is_named(learned):
    network = v1.network()
    network[3] = torch.nn.Conv2d(4, 6, 1)
    message = does_not_fit(learned[1], network)
    assert "It was learned on another backbone" in message
    assert "The architecture differs." in message


@pytest.mark.parametrize(
    ("index", "layer"), [(2, torch.nn.ReLU6()), (5, torch.nn.AdaptiveMaxPool2d(1))]
)
def test_an_architecture_of_the_same_weights_is_named(learned, index, layer):
    network = v1.network()
    network[index] = layer
    message = does_not_fit(learned[1], network)
    assert "another architecture: the weights are the same, but layers or their" in message
    network = v1.network()
    network[3].dilation = network[3].padding = (2, 2)
    assert "another architecture" in does_not_fit(learned[1], network)


def test_another_head_is_no_other_backbone(learned):
    model, path = learned
    network = v1.network()
    network[-1] = torch.nn.Linear(6, 99)
    fresh = convert(network, v1.CONFIG)
    fresh.load_domain(path)
    assert torch.equal(scores_of(fresh), scores_of(model))


def test_another_config_is_named(learned):
    config = DA3Config(
        adapter=AdapterConfig(hidden_channels=3), gate=GateConfig(target=0.25, by="cell")
    )
    message = does_not_fit(
        learned[1], v1.network(), DA3Config(adapter=v1.CONFIG.adapter, gate=config.gate)
    )
    assert "Its config has gate={" in message
    assert "adapter=" not in message
    assert "plan" not in message


def test_another_plan_is_named(learned):
    path = learned[1]
    file = read_domain(path)
    write_domain(path, file.tensors, {**file.metadata, "plan": "0"})
    message = does_not_fit(path, v1.network())
    assert "Its plan has other hosts or another head, though backbone and config" in message


def rewritten(path, tensors=(), **about):
    file = read_domain(path)
    write_domain(path, {**file.tensors, **dict(tensors)}, {**file.metadata, **about})


def test_fields_that_a_later_config_gains_keep_their_defaults(learned):
    path = learned[1]
    config = read_domain(path).metadata["config"]
    del config["adapter"]["min_depth"]  # as a version that did not have it
    del config["memory"]
    rewritten(path, config=config)
    convert(v1.network(), v1.CONFIG).load_domain(path)
    config["adapter"]["rank"] = 3  # of a version to come
    rewritten(path, config=config)
    assert "Its config cannot be read: AdapterConfig has no field" in does_not_fit(
        path, v1.network()
    )


@pytest.mark.parametrize("value", [0, -1, True, "3", None, [3], 2**40, 2**62, 2**64, 10**30])
def test_class_counts_that_do_not_fit_the_head(learned, value):
    rewritten(learned[1], num_classes=value, class_names=None)
    does_not_fit(learned[1], v1.network())


@pytest.mark.parametrize("names", [["a"], "abc", [1, 2, 3], 3, {"a": 1}])
def test_class_names_that_are_none(learned, names):
    rewritten(learned[1], class_names=names)
    assert "class_names" in does_not_fit(learned[1], v1.network())


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "", 3, None, "a\0b"])
def test_paths_in_the_place_of_a_name(learned, name):
    rewritten(learned[1], domain=name)
    assert "cannot name a domain" in does_not_fit(learned[1], v1.network())


def test_tensors_that_do_not_fit_are_all_named(learned):
    rewritten(
        learned[1],
        {
            "../x": torch.ones(1),
            "head.bias": torch.ones(3, dtype=torch.int64),
            "head.weight": torch.ones(4, 6),
        },
    )
    message = does_not_fit(learned[1], v1.network())
    assert "It has '../x', which is not expected." in message
    assert "'head.bias' is of torch.int64, not torch.float32." in message
    assert "'head.weight' has the shape (4, 6), not (3, 6)." in message
    file = read_domain(learned[1])
    write_domain(learned[1], {"head.bias": file.tensors["head.bias"]}, file.metadata)
    assert "It lacks ['adapters." in does_not_fit(learned[1], v1.network())


def test_class_names_live_in_the_file_and_in_the_state(learned):
    model, path = learned
    names = ["rose", "tulip", "lily"]
    fresh = convert(v1.network(), v1.CONFIG)
    fresh.load_domain(path)
    assert fresh.domain("a").class_names == names
    other = convert(v1.network(), v1.CONFIG)
    other.load_state_dict(model.state_dict())
    assert other.domain("a").class_names == names
    with pytest.raises(ConfigError, match="one name for each of the 2 classes, got 1"):
        fresh.add_domain("b", 2, class_names=["x"])
    with pytest.raises(ConfigError, match="must be a sequence of str, got 'xy'"):
        fresh.add_domain("b", 2, class_names="xy")
    assert fresh.domains == ["a"]
