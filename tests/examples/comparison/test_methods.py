"""Every method against a statement of its formula that shares no code with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.blocks import small_batch, small_net
from torch import nn

BN = nn.BatchNorm2d


def methods():
    from comparison.methods import METHODS

    return METHODS


def built(name):
    if name == "LoRA":
        pytest.importorskip("peft")
    return methods()[name].build(small_net())


def trained(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def randomise_(parameters, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) / 2)


def gradients(network, images, labels):
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.requires_grad}


NAMES = (
    "fine-tuning,checkpointing,linear probe,biases only,series adapters,parallel adapters,"
    "Piggyback,TinyTL,LoRA,DA3,DA3 gates,DA3 exact"
).split(",")


def test_the_names_of_all_methods():
    smaller = [f"DA3 {share}% of FLOPs" for share in (80, 65, 50)]
    assert list(methods()) == [*NAMES, "DA3 small", "DA3 accurate", *smaller]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_what_trains_and_nothing_else(name):
    method, network = methods()[name], built(name)
    before = copy.deepcopy(dict(network.named_parameters()))
    names = trained(network)
    optimizer = method.optimizer(network, method.rates[0])
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in network.parameters() if p.requires_grad}
    for seed in range(3):
        gradients(network, *small_batch(seed=seed))
        optimizer.step()
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= names
    assert any("classifier" in n or "head" in n for n in changed)


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_from_the_pretrained_network(name):
    network = small_net()
    images, _ = small_batch()
    adapted = built(name).eval()
    if name.startswith("DA3"):
        adapted.set_domain(None)  # the domain has a head of its own
    # masks, adapters, updates and lite modules add nothing yet
    torch.testing.assert_close(adapted(images), network.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rates_ascend_and_the_method_says_what_it_is(name):
    from comparison.rates import LADDER

    method = methods()[name]
    start = LADDER.index(method.rates[0])
    assert list(method.rates) == list(LADDER[start : start + len(method.rates)])
    assert len(method.rates) >= 3
    assert list(method.grid(1)) == [method.rates[1]]
    assert list(method.grid(2)) == list(method.rates[:2])
    assert method.grid(3) == method.grid(9) == method.rates
    assert method.learns_as in (None, *methods())


def test_fine_tuning_trains_everything_on_the_statistics_of_the_batch():
    network = built("fine-tuning")
    images, _ = small_batch()
    assert trained(network) == {n for n, _ in network.named_parameters()}
    x = network.stem(images)
    block = network.blocks[0]
    y = block.conv1(x)
    expected = F.batch_norm(y, None, None, block.bn1.weight, block.bn1.bias, training=True)
    torch.testing.assert_close(block.bn1(y), expected)


def test_a_linear_probe_learns_from_features_that_stay():
    network = built("linear probe")
    images, labels = small_batch()
    assert trained(network) == {"classifier.weight", "classifier.bias"}
    features = network.blocks(network.stem(images)).mean((2, 3))
    found = gradients(network, images, labels)
    probabilities = (features @ network.classifier.weight.T + network.classifier.bias).softmax(1)
    error = (probabilities - F.one_hot(labels, 3)) / len(labels)
    torch.testing.assert_close(found["classifier.weight"], error.T @ features)
    torch.testing.assert_close(
        network.blocks[0].bn1.running_mean, small_net().blocks[0].bn1.running_mean
    )


def test_biases_and_the_head_train_and_statistics_stay():
    network = built("biases only")
    gradients(network, *small_batch())
    norms = {f"blocks.{i}.bn{j}.bias" for i in range(2) for j in (1, 2)}
    assert trained(network) == {"stem.bias", "classifier.weight", "classifier.bias"} | norms
    for name, buffer in small_net().named_buffers():
        assert torch.equal(network.get_buffer(name), buffer)


def test_biases_of_attention_train_too():
    from comparison.methods.plain import biases_only

    network = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.Linear(4, 2))
    biases = {"0.in_proj_bias", "0.out_proj.bias", "1.bias"}
    assert trained(biases_only(network)) == biases | {"2.weight", "2.bias"}


def test_series_adapters_by_their_formula():
    network = built("series adapters")
    images, _ = small_batch()
    host = network.blocks[0].conv1
    randomise_([host.adapter.weight, host.norm.weight, host.norm.bias])
    x = network.stem(images)
    plain = small_net().blocks[0]
    z = F.conv2d(x, plain.conv1.weight, padding=1)  # z' of the formula
    z1 = F.batch_norm(z, None, None, host.norm.weight, host.norm.bias, training=True)
    mixed = torch.einsum("oc,nchw->nohw", host.adapter.weight[:, :, 0, 0], z1)
    own = network.blocks[0].bn1
    expected = F.batch_norm(mixed + z, None, None, own.weight, own.bias, training=True)
    torch.testing.assert_close(own(host(x)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (3, 2, 0, 1),
        (5, 2, 2, 1),
        (3, 1, 2, 2),
        (4, 4, 0, 1),
        (2, 1, 0, 1),
        (7, 2, 3, 1),
    ],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_parallel_adapters_are_the_middle_of_the_window(kernel, stride, padding, dilation, groups):
    from comparison.methods.residual_adapters import Parallel

    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups=groups)
    adapted = Parallel(conv)
    randomise_([adapted.adapter.weight])
    weight = conv.weight.detach().clone()
    middle = (kernel - 1) // 2
    weight[:, :, middle, middle] += adapted.adapter.weight[:, :, 0, 0]
    x = small_batch(size=17)[0].repeat(1, 2, 1, 1)[:, :4]
    expected = F.conv2d(x, weight, conv.bias, stride, padding, dilation, groups)
    torch.testing.assert_close(adapted(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["series adapters", "parallel adapters"])
def test_residual_adapters_train_norms_adapters_and_the_head(name):
    names = trained(built(name))
    assert {"classifier.weight", "classifier.bias", "blocks.0.bn1.weight"} <= names
    others = {n for n in names if "adapter" not in n and ".norm." not in n and "bn" not in n}
    assert others == {"classifier.weight", "classifier.bias"}
    hosts = ["stem", *(f"blocks.{i}.conv{j}" for i in range(2) for j in (1, 2))]
    assert {n for n in names if "adapter" in n} == {f"{h}.adapter.weight" for h in hosts}


def test_residual_adapters_need_a_spatial_convolution():
    from comparison.input_errors import InputError

    with pytest.raises(InputError, match="none: leave these methods out"):
        methods()["series adapters"].build(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 64), nn.Flatten(), nn.Linear(4, 2)), "none in a row"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "which this network does not take"),
    ],
)
def test_tinytl_needs_blocks_and_an_image_that_fits(network, words):
    from comparison.input_errors import InputError

    with pytest.raises(InputError, match=f"{words}: leave this method out with --methods"):
        methods()["TinyTL"].build(network)
    assert not any(module._forward_hooks for module in network.modules())


def test_piggyback_by_its_formula():
    network, plain = built("Piggyback"), small_net()
    images, labels = small_batch()
    masks = {n: p for n, p in network.named_parameters() if n.endswith(".mask")}
    assert {n.split(".parametrizations")[0] for n in masks} == {
        "stem",
        *(f"blocks.{i}.{c}" for i in range(2) for c in ("conv1", "conv2", "short")),
    }
    assert all((m == 1e-2).all() for m in masks.values())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in masks.values():
            m.copy_(5e-3 + torch.randn(m.shape, generator=generator) / 100)
    weights = {n: plain.get_parameter(f"{n.split('.parametrizations')[0]}.weight") for n in masks}
    with torch.no_grad():
        for name, w in weights.items():
            w.mul_((masks[name] > 5e-3).float())
    plain.eval().classifier.load_state_dict(network.classifier.state_dict())
    torch.testing.assert_close(network(images), plain(images))
    found, effective = gradients(network, images, labels), gradients(plain, images, labels)
    original = small_net()
    for name in masks:
        layer = f"{name.split('.parametrizations')[0]}.weight"
        expected = effective[layer] * original.get_parameter(layer)
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


def test_piggyback_learns_its_head_faster():
    network = built("Piggyback")
    masks, head = methods()["Piggyback"].optimizer(network, 1e-4).param_groups
    assert (masks["lr"], head["lr"]) == (1e-4, pytest.approx(1e-3))
    assert {id(p) for p in head["params"]} == {id(p) for p in network.classifier.parameters()}


def test_tinytl_by_its_formula():
    network, plain = built("TinyTL"), small_net().eval()
    images, _ = small_batch(size=32)
    lite = network.blocks[1].lite
    conv, norm1, _, conv1, norm2 = list(lite)[1:]
    assert (norm2.weight == 0).all()
    randomise_([norm2.weight, norm2.bias, norm1.bias])
    x = network.blocks[0](network.stem(images))
    h = F.conv2d(
        F.avg_pool2d(x, 2), conv.weight, stride=2, padding=conv.weight.shape[-1] // 2, groups=2
    )
    h = F.batch_norm(h, None, None, norm1.weight, norm1.bias, training=True).relu()
    h = F.batch_norm(F.conv2d(h, conv1.weight), None, None, norm2.weight, norm2.bias, training=True)
    y = plain.blocks[1](x)
    expected = y + F.interpolate(h, y.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(network.blocks[1](x), expected, atol=1e-5, rtol=1e-4)
    assert conv.weight.shape[-1] <= 5
    assert conv.groups == 2


def test_tinytl_trains_biases_and_its_modules_and_keeps_the_statistics():
    network, plain = built("TinyTL"), small_net()
    names = trained(network)
    gradients(network, *small_batch())
    own = {n for n in names if ".lite." in n}
    assert own == {n for n, _ in network.named_parameters() if ".lite." in n}
    assert {n.replace(".block.", ".") for n in names - own} == trained(
        methods()["biases only"].build(plain)
    )
    for i, block in enumerate(network.blocks):
        assert torch.equal(block.block.bn1.running_mean, small_net().blocks[i].bn1.running_mean)


def test_lora_by_its_formula():
    network, plain = built("LoRA"), small_net().eval()
    images, _ = small_batch()
    host = network.blocks[0].conv1
    down, up = host.lora_A["default"].weight, host.lora_B["default"].weight
    assert down.shape[0] == 8
    assert (up == 0).all()
    randomise_([up, down])
    x = plain.stem(images)
    weight = plain.blocks[0].conv1.weight + torch.einsum("or,rchw->ochw", up[:, :, 0, 0], down)
    torch.testing.assert_close(host(x), F.conv2d(x, weight, padding=1), atol=1e-4, rtol=1e-4)
    names = trained(network)
    assert {n for n in names if "lora_" not in n} == {"classifier.weight", "classifier.bias"}
    assert not any("conv2" in n for n in names)  # depthwise
    assert not any(m.training for m in network.modules() if isinstance(m, BN))


@pytest.mark.parametrize("name", ["LoRA", "Piggyback"])
def test_what_is_merged_computes_the_same_without_what_trained(name):
    network = built(name)
    images, _ = small_batch()
    randomise_([p for n, p in network.named_parameters() if "lora_" in n])
    for n, p in network.named_parameters():
        if n.endswith(".mask"):
            p.data[::2] = 0
    before = network.eval()(images)
    count = sum(1 for _ in network.named_parameters())
    merged = methods()[name].merge(network)
    torch.testing.assert_close(merged(images), before, atol=1e-4, rtol=1e-4)
    if name == "Piggyback":
        assert sum(1 for _ in merged.named_parameters()) < count


def test_checkpointing_learns_what_fine_tuning_learns_and_keeps_less():
    from lightning_da3.memory import saved_activation_bytes

    networks = {name: built(name) for name in ("fine-tuning", "checkpointing")}
    states, kept = {}, {}
    for name, network in networks.items():
        optimizer = methods()[name].optimizer(network, 1e-2)
        for seed in range(3):
            gradients(network, *small_batch(seed=seed))
            optimizer.step()
        states[name] = {n.replace(".block.", "."): t for n, t in network.state_dict().items()}
        kept[name] = saved_activation_bytes(network, small_batch()[0])
    assert states["fine-tuning"].keys() == states["checkpointing"].keys()
    for name, value in states["fine-tuning"].items():
        assert torch.equal(value, states["checkpointing"][name]), name
    assert kept["checkpointing"] < kept["fine-tuning"]


def test_the_gates_of_da3_and_their_absence():
    assert built("DA3").config.gate is None
    assert built("DA3 gates").config.gate is not None
    exact = built("DA3 exact").config
    assert (exact.gate, exact.memory.exact) == (None, True)
    assert not any(n.startswith(("stem", "blocks")) for n in trained(built("DA3")))
