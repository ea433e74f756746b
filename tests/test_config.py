"""Configs check themselves, say what is wrong, and come back from plain types."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    DA3Callback,
    DA3Config,
    DA3Error,
    DA3Strategy,
    GateConfig,
    MemoryConfig,
    convert,
    fit_sequence,
)
from lightning_da3.config import CONFIG_VERSION

CELLS = GateConfig(0.5, by="cell")
UNUSUAL = DA3Config(
    adapter=AdapterConfig(hidden_channels=3, kernel_size=1, max_cells=4, min_stride=1),
    gate=GateConfig(target=1.0, weight=0, noise=True, by="cell"),
    memory=MemoryConfig(exact=True, weights="bfloat16"),
    head="classifier.1",
)


def refused(make, *messages):
    with pytest.raises(ConfigError) as caught:
        make()
    assert isinstance(caught.value, (DA3Error, ValueError))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["hidden_channels", "max_cells"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None])
def test_counts_are_ints_of_at_least_1(name, value):
    message = f"`{name}` must be an int of at least 1, got {value!r}."
    refused(lambda: AdapterConfig(**{name: value}), message)
    assert getattr(AdapterConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", "Auto", None])
def test_min_stride_is_auto_or_an_int_of_at_least_1(value):
    message = f'`min_stride` must be "auto" or an int of at least 1, got {value!r}.'
    refused(lambda: AdapterConfig(min_stride=value), message)
    assert [AdapterConfig(min_stride=s).min_stride for s in (1, "auto")] == [1, "auto"]


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0", float("nan"), None])
def test_min_depth_is_auto_or_a_share(value):
    message = f'`min_depth` must be "auto" or a number from 0 to 1, got {value!r}.'
    refused(lambda: AdapterConfig(min_depth=value), message)
    assert [AdapterConfig(min_depth=d).min_depth for d in (0, 0.5, 1, "auto")] == [
        0,
        0.5,
        1,
        "auto",
    ]


@pytest.mark.parametrize("value", [0, 2, 5, 3.0, True, "3"])
def test_kernel_size_is_1_or_3(value):
    message = f"`kernel_size` must be 1 or 3, got {value!r}."
    refused(lambda: AdapterConfig(kernel_size=value), message)
    assert [AdapterConfig(kernel_size=k).kernel_size for k in (1, 3)] == [1, 3]


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.5", True, None]
)
def test_target_is_a_fraction(value):
    refused(lambda: GateConfig(target=value), f"`target` must lie in (0, 1], got {value!r}.")
    assert GateConfig(target=1).target == 1


def test_gates_skip_branches_by_default_and_those_of_cells_have_options():
    assert GateConfig() == GateConfig(target=0.65, by="domain")
    for option in ({"weight": 1.0}, {"noise": False}):
        refused(lambda option=option: GateConfig(**option), "`weight` and `noise`", "by='cell'")
        assert GateConfig(by="cell", **option) != GateConfig(by="cell")
    refused(lambda: GateConfig(by="sample"), "`by` must be 'domain' or 'cell', got 'sample'.")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", False, None])
def test_weight_is_finite(value):
    refused(
        lambda: GateConfig(weight=value), f"`weight` must be finite and at least 0, got {value!r}."
    )
    assert GateConfig(weight=0, by="cell").weight == 0


def test_flags_are_bools():
    refused(lambda: GateConfig(noise=1), "`noise` must be a bool, got 1.")
    refused(lambda: MemoryConfig(exact="yes"), "`exact` must be a bool, got 'yes'.")


def test_parts_have_their_types():
    refused(lambda: DA3Config(adapter={}), "`adapter` must be of type AdapterConfig, got {}.")
    refused(lambda: DA3Config(memory=None), "`memory` must be of type MemoryConfig, got None.")
    refused(lambda: DA3Config(gate=0.5), "`gate` must be a GateConfig or None, got 0.5.")
    for head in ("", 3, True):
        message = f"`head` must be 'auto', a module name or None, got {head!r}."
        refused(lambda head=head: DA3Config(head=head), message)


def test_all_problems_are_reported_at_once():
    refused(
        lambda: AdapterConfig(hidden_channels=0, kernel_size=2),
        "`hidden_channels` must be an int of at least 1, got 0.",
        "`kernel_size` must be 1 or 3, got 2.",
    )
    refused(lambda: GateConfig(target=2, weight=-1), "`target`", "`weight`")
    refused(lambda: DA3Config(adapter=1, head=""), "`adapter`", "`head`")


def test_configs_are_frozen_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DA3Config().head = "fc"
    assert DA3Config() == DA3Config()
    assert hash(DA3Config()) == hash(DA3Config())
    assert DA3Config() != UNUSUAL
    assert dataclasses.replace(UNUSUAL, gate=None).gate is None


@pytest.mark.parametrize(
    "config",
    [DA3Config(), DA3Config(gate=GateConfig(), head=None), UNUSUAL],
    ids=["default", "gated", "all"],
)
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == CONFIG_VERSION
    assert DA3Config.from_dict(values) == config


def test_missing_fields_are_defaults():
    assert DA3Config.from_dict({}) == DA3Config()
    config = DA3Config.from_dict(
        {"adapter": {"min_stride": 2}, "gate": {"noise": False, "by": "cell"}}
    )
    assert config == DA3Config(AdapterConfig(min_stride=2), GateConfig(noise=False, by="cell"))
    assert DA3Config.from_dict({"gate": None}).gate is None


def test_gates_are_off_unless_asked_for():
    assert DA3Config().gate is None
    assert DA3Config.from_dict({"version": CONFIG_VERSION}).gate is None


def test_configs_of_version_1_had_gates_unless_they_say_otherwise():
    old = {"version": 1, "adapter": {"min_depth": 0}}
    assert DA3Config.from_dict(old) == DA3Config(AdapterConfig(min_depth=0), CELLS)
    assert DA3Config.from_dict({**old, "gate": None}).gate is None
    assert DA3Config.from_dict({**old, "gate": {"target": 0.3}}).gate == GateConfig(0.3, by="cell")


def test_configs_of_before_had_hosts_at_any_depth():
    old = {"version": 1, "adapter": {"hidden_channels": 3}}
    assert DA3Config.from_dict(old).adapter == AdapterConfig(hidden_channels=3, min_depth=0)
    assert DA3Config.from_dict({"version": 1}).adapter.min_depth == 0
    assert DA3Config.from_dict({"version": 1, "adapter": {"min_depth": 1}}).adapter.min_depth == 1


def test_from_dict_leaves_its_argument_alone():
    values = UNUSUAL.to_dict()
    before = json.dumps(values)
    DA3Config.from_dict(values)
    assert json.dumps(values) == before


def test_unknown_fields_are_refused_with_the_known_ones():
    refused(
        lambda: DA3Config.from_dict({"adaptor": {}}),
        "DA3Config has no field ['adaptor'].",
        "It has ['adapter', 'gate', 'memory', 'head'].",
    )
    refused(
        lambda: DA3Config.from_dict({"gate": {"targets": 0.5}}),
        "GateConfig has no field ['targets'].",
        "It has ['target', 'weight', 'noise', 'by'].",
    )


def test_wrong_values_are_refused_from_a_dict_too():
    refused(lambda: DA3Config.from_dict({"adapter": {"kernel_size": 7}}), "`kernel_size`")
    refused(lambda: DA3Config.from_dict({"memory": 1}), "`memory` must be of type MemoryConfig")
    refused(lambda: DA3Config.from_dict({5: 1, "x": 2}), "DA3Config has no field ['x', 5].")


@pytest.mark.parametrize("version", [CONFIG_VERSION + 1, 0, -1, "1", 1.0, True, None])
def test_other_versions_are_refused(version):
    refused(
        lambda: DA3Config.from_dict({**DA3Config().to_dict(), "version": version}),
        f"Config version {version!r} cannot be read here",
        "Update lightning_da3.",
    )


def test_configs_from_when_derivatives_had_a_choice_of_bits():
    values = DA3Config().to_dict()
    values["memory"]["derivative_bits"] = 8
    assert DA3Config.from_dict(values) == DA3Config()
    values["memory"]["derivative_bits"] = 4
    refused(lambda: DA3Config.from_dict(values), "`derivative_bits` is always 8 now, got 4.")


@pytest.mark.parametrize("weights", ["float16", None, "BFLOAT16", 16])
def test_weights_rest_in_one_of_two_ways(weights):
    refused(
        lambda: MemoryConfig(weights=weights),
        f"`weights` must be 'same' or 'bfloat16', got {weights!r}.",
    )
    assert MemoryConfig().stored_dtype is None
    assert MemoryConfig(weights="bfloat16").stored_dtype == torch.bfloat16


def test_configs_from_before_the_weights_could_rest():
    values = DA3Config().to_dict()
    del values["memory"]["weights"]
    assert DA3Config.from_dict(values) == DA3Config()


def test_presets_are_configs_by_name():
    assert DA3Config.preset("default") == DA3Config()
    small, accurate, fast = (DA3Config.preset(name) for name in ("small", "accurate", "fast"))
    assert small.adapter == AdapterConfig(hidden_channels=16)
    assert accurate.adapter == AdapterConfig(max_cells=196)
    assert small.gate is accurate.gate is None
    assert fast == DA3Config(gate=GateConfig())
    assert len({small, DA3Config(), accurate, fast}) == 4


@pytest.mark.parametrize("name", ["large", "", None, 1])
def test_unknown_presets_are_refused_with_the_known_ones(name):
    message = f"`name` must be one of ['small', 'default', 'accurate', 'fast'], got {name!r}."
    refused(lambda: DA3Config.preset(name), message)


NINES = "9" * 400


@pytest.mark.parametrize(
    "value",
    [
        *(
            "²",
            "²MiB",
            "\uff11\uff12MiB",
            "\u0663GB",
            NINES,
            f"{NINES}MiB",
            "nanMiB",
            "infGB",
            "-1MB",
            "",
            " ",
        ),
        *(
            0,
            -1,
            True,
            False,
            1.5,
            float("nan"),
            int(NINES),
            10**5000,
            2**63,
            [],
            {},
            torch.ones(2),
        ),
        *(np.array([1, 2]), np.array(["auto"]), b"1MiB", "1 2MiB", "0.1B", "MiB", "1mib"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_budget(value):
    with pytest.raises(ConfigError, match="`budget` must be bytes, a number with a unit") as caught:
        MemoryConfig(budget=value)
    assert len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match="`budget`"):
        DA3Config().within(value)


@pytest.mark.parametrize("value", [1, 2**62, "1B", " 1.5 GiB ", "007kB", "auto", None])
def test_what_is_a_budget(value):
    assert MemoryConfig(budget=value).budget == value


WRONG = [0, 1.5, [], [1], "gates", True, float("nan"), ("gate", None), torch.ones(1), GateConfig()]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_what_stands_for_no_config(value):
    for take in (
        DA3Config.of,
        lambda config: convert(nn.Sequential(nn.Conv2d(3, 4, 3)), config),
        lambda config: DA3Callback("a", 2, config=config),
        lambda config: DA3Strategy("a", 2, config=config),
        lambda config: fit_sequence(None, {"a": (2, [])}, None, "nowhere", config=config),
    ):
        refused(lambda take=take: take(value), "`config` must be a DA3Config, a dict of its fields")


def test_a_dict_is_a_config_as_in_yaml():
    values = {
        "gate": {"by": "cell"},
        "memory": {"budget": "1GiB"},
        "adapter": {"hidden_channels": 3},
    }
    want = DA3Config(AdapterConfig(hidden_channels=3), GateConfig(by="cell"))
    config = DA3Config.of(values)
    assert config == want
    assert config.memory.budget == "1GiB"
    assert DA3Callback("a", 2, config=values).config == want
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), {**values, "head": None})
    assert model.config.gate == want.gate
    assert DA3Config.of({}) == DA3Config.of(None) == DA3Config()
    assert DA3Config.of(config) is config
    refused(lambda: DA3Callback("a", 2, config={"gates": None}), "DA3Config has no field ['gates']")


@pytest.mark.parametrize("value", [np.array([0.1, 0.2]), torch.ones(3), 10**400, -(10**400), []])
def test_no_value_breaks_the_checks(value):
    for name in ("target", "weight", "noise"):
        refused(lambda name=name: GateConfig(**{name: value}), f"`{name}`")
    for name in ("exact", "weights", "split"):
        refused(lambda name=name: MemoryConfig(**{name: value}), f"`{name}`")
    for name in ("adapter", "gate", "memory", "head"):
        refused(lambda name=name: DA3Config(**{name: value}), f"`{name}`")
    for name in ("kernel_size", "min_stride"):
        if name == "kernel_size" or not isinstance(value, int) or value < 0:
            refused(lambda name=name: AdapterConfig(**{name: value}), f"`{name}`")
