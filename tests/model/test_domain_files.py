"""Files of domains: saved, loaded, and refused where they do not fit."""

import math

import pytest
import torch
from helpers import models
from helpers.comparing import assert_identical
from helpers.domains import refused, shake_
from helpers.learned import (
    ADAPTER,
    CONFIG,
    assert_same_domains,
    converted,
    outputs,
    trainable,
)

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    DomainError,
    convert,
)
from lightning_da3.files.domain_file import read_domain, write_domain


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_a_saved_domain_comes_back_bit_for_bit(path):
    model = converted("a")
    model.save_domain("a", path, accuracy=0.5)
    other = converted("b")
    assert other.load_domain(path) == "a"
    assert other.domains == ["b", "a"]
    assert other.active_domain is None
    assert not trainable(other)
    assert other.domain("a").num_classes == 3
    assert_same_domains(other, model, (None, "a"))
    assert read_domain(path).metadata["extra"] == {"accuracy": 0.5}


def test_a_saved_domain_under_another_name(path):
    model = converted("a")
    model.save_domain("a", path)
    assert model.load_domain(path, name="twin") == "twin"
    assert_identical(outputs(model, "twin"), outputs(model, "a"))


def test_a_domain_without_a_head(path):
    config = DA3Config(adapter=ADAPTER, head=None, gate=None)
    model, other = converted("a", config=config), converted(config=config)
    model.save_domain("a", path)
    other.load_domain(path)
    assert_same_domains(other, model, (None, "a"))


def test_the_file_holds_the_domain_alone(path):
    model = converted("a", "b")
    model.save_domain("a", path)
    own = model.domain("a").state_dict()
    assert read_domain(path).tensors.keys() == own.keys()
    assert path.stat().st_size < sum(t.numel() * 4 for t in own.values()) + 8_000


def test_a_domain_of_another_backbone_is_refused(path):
    model = converted("a")
    model.save_domain("a", path)
    other = convert(models.randomise_(models.zoo("Residual"), seed=9), CONFIG)
    with refused(
        CheckpointError,
        f"The domain file {str(path)!r} does not fit this model",
        "It was learned on another backbone (Residual",
        model.fingerprint[:12],
        other.fingerprint[:12],
    ):
        other.load_domain(path)
    assert other.domains == []


def test_a_domain_of_another_config_is_refused_with_every_difference(path):
    converted("a").save_domain("a", path)
    config = DA3Config(adapter=AdapterConfig(hidden_channels=5, min_stride=1), gate=None)
    other = converted(config=config)
    parts = ("Its config has adapter={", "Its config has gate={", "Convert with the config that")
    with refused(CheckpointError, *parts):
        other.load_domain(path)
    assert other.domains == []


def test_a_domain_s_own_name_may_be_taken(path):
    model = converted("a")
    model.save_domain("a", path)
    shake_(model, "a")
    before = outputs(model, "a")
    with refused(DomainError, "There is a domain 'a' already."):
        model.load_domain(path)
    assert model.domains == ["a"]
    assert_identical(outputs(model, "a"), before)


def test_damaged_and_foreign_files_are_refused(path):
    model = converted("a")
    model.save_domain("a", path)
    content = path.read_bytes()
    other = converted()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with refused(CheckpointError, f"Cannot read the domain file {str(path)!r}"):
            other.load_domain(path)
    with refused(CheckpointError, "Cannot read the domain file"):
        other.load_domain(path.with_name("missing"))
    write_domain(path, {"x": torch.zeros(1)}, {"domain": "a"})
    with refused(CheckpointError, "it lacks [", "'config'", "`save_domain` writes whole ones"):
        other.load_domain(path)
    assert other.domains == []


def test_tensors_that_do_not_fit_are_refused_and_leave_nothing(path):
    model = converted("a")
    model.save_domain("a", path)
    file = read_domain(path)
    tensors = {**file.tensors, "head.weight": torch.zeros(9, 9)}
    write_domain(path, tensors, file.metadata)
    other = converted()
    with refused(CheckpointError, "does not fit this model", "head.weight"):
        other.load_domain(path)
    assert other.domains == []
    assert other.active_domain is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_and_the_last_good_file_stays(path, value):
    model = converted("a")
    model.save_domain("a", path)
    content, good = path.read_bytes(), outputs(model, "a")
    with torch.no_grad():
        model.domain("a").head.bias[0] = value
    with refused(CheckpointError, "NaN or infinite values in ['head.bias']", "last good file"):
        model.save_domain("a", path)
    assert path.read_bytes() == content
    other = converted()
    other.load_domain(path)
    assert_identical(outputs(other, "a"), good)


def test_an_unknown_domain_is_not_saved(path):
    with refused(DomainError, "There is no domain 'b'."):
        converted("a").save_domain("b", path)
    assert not path.exists()


@pytest.mark.parametrize("change", [{"config": {}}, {"config": 3}, {"backbone": None}])
def test_a_file_that_says_too_little_is_refused(tmp_path, change):
    model = converted("a")
    path = tmp_path / "a.safetensors"
    model.save_domain("a", path)
    file = read_domain(path)
    about = {**file.metadata, **change}
    write_domain(path, file.tensors, {k: v for k, v in about.items() if v is not None})
    fresh = converted()
    with pytest.raises(CheckpointError, match="it lacks"):
        fresh.load_domain(path)
    assert fresh.domains == []


def network(compiled):
    """As it is, or with `torch.compile` around all of it, around a part, or by the method."""
    made = models.randomise_(models.zoo("Residual"))
    if compiled == "part":
        made.conv1 = torch.compile(made.conv1, backend="eager")
    elif compiled == "method":
        made.compile(backend="eager")
    elif compiled == "whole":
        made = torch.compile(made, backend="eager")
    return made


COMPILED = ["whole", "part", "method"]


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_network_is_the_same_backbone(path, compiled):
    plain, other = convert(network("not"), CONFIG), convert(network(compiled), CONFIG)
    plain.add_domain("a", 3)
    other.add_domain("b", 3)
    shake_(plain, "a")
    plain.save_domain("a", path)
    other.load_domain(path)
    assert_identical(outputs(other, "a"), outputs(plain, "a"))
    other.save_domain("b", path)
    assert plain.load_domain(path) == "b"
    assert (other.fingerprint, other.architecture) == (plain.fingerprint, plain.architecture)


@pytest.mark.parametrize("compiled", COMPILED)
def test_the_state_of_a_compiled_network_goes_into_the_backbone(compiled):
    source = network(compiled)
    model = convert(models.randomise_(models.zoo("Residual"), seed=9), CONFIG)
    result = model.load_state_dict(source.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_identical(outputs(model, None), outputs(convert(network("not"), CONFIG), None))


@pytest.mark.parametrize("compiled", ["whole", "part"])
def test_what_earlier_versions_saved_of_a_compiled_network_loads(path, compiled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lightning_da3.model.identity.uncompiled_name", str)  # as they had it
        patch.setattr("lightning_da3.converting.original_of", lambda _: None)
        earlier = convert(network(compiled), CONFIG)
        earlier.add_domain("a", 3)
        earlier.save_domain("a", path)
        state = earlier.state_dict()
    assert earlier.fingerprint != convert(network("not"), CONFIG).fingerprint
    assert convert(network(compiled), CONFIG).load_domain(path) == "a"
    convert(network(compiled), CONFIG).load_state_dict(state)


def test_a_file_whose_name_was_allowed_once_loads_under_another(path):
    model = converted("a")
    model.save_domain("a", path)
    file = read_domain(path)
    write_domain(path, file.tensors, {**file.metadata, "domain": "aux"})
    with refused(CheckpointError, "'aux' cannot name a domain", "Use another name"):
        converted().load_domain(path)
    assert converted().load_domain(path, name="other") == "other"
