"""Batches whose samples belong to different domains, and domains found from the samples."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures import v1
from helpers import lit, models
from helpers.domains import refused, shake_
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils._pytree import tree_map
from torchvision.models import VisionTransformer

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    DomainError,
    GateConfig,
    InputError,
    convert,
    load_from_checkpoint,
)
from lightning_da3.files.domain_file import read_domain, write_domain
from lightning_da3.model.state import domain_state
from lightning_da3.nn.frozen import FrozenConv
from lightning_da3.nn.statistics import FACTORS, SHRINKAGE, Statistics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1.safetensors"

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CLASSES = {"a": 3, "b": 7, "c": 4}
MIX = ["b", "a", None, "c", "b"]


class Island(models.Residual):
    """Python that looks at values, around graphs."""

    def features(self, x):
        if x.mean() > 1e6:
            raise OverflowError
        return super().features(x)


class Segmentation(nn.Module):
    """A head in the middle, a map of scores, and a second output that is none of its business."""

    def __init__(self):
        super().__init__()
        self.conv, self.score = nn.Conv2d(3, 7, 3, 2, 1), nn.Conv2d(7, models.CLASSES, 1)

    def forward(self, x):
        features = self.conv(x).relu()
        scores = F.interpolate(self.score(features), x.shape[-2:], mode="bilinear")
        return {"out": scores.softmax(1), "features": features, "scale": 2}


class Lists(nn.Module):
    """Takes and returns one entry an image, as detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        maps = self.conv(torch.stack(images))
        return [{"boxes": m.flatten(1)[:, : 4 + i]} for i, m in enumerate(maps)]


class Crops(nn.Module):
    """Works on two crops of every image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.cat(x.chunk(2, dim=3))).mean((1, 2, 3)).view(2, -1).mean(0)


class SumOfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).sum((0, 2, 3))


def transformer():
    return VisionTransformer(
        image_size=12,
        patch_size=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=models.CLASSES,
    )


OWN = {"transformer": transformer, "Island": Island, "Segmentation": Segmentation}
HEADLESS = {"DictOutput", "Crops", "Lists", "SumOfTheBatch"}
OWN |= {kind.__name__: kind for kind in (Crops, Lists, SumOfTheBatch)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def learned(name="Residual", gate=True, classes=CLASSES):
    """A network with domains that have learned something: random parameters."""
    network = models.randomise_(OWN[name]()) if name in OWN else models.zoo(name)
    head = None if name in HEADLESS else {"Island": "fc"}.get(name, "auto")
    config = DA3Config(adapter=ADAPTER, gate=GateConfig() if gate else None, head=head)
    model = convert(network, config).eval()
    for domain, count in classes.items():
        model.add_domain(domain, None if head is None else count)
        shake_(model, domain, 1.0)
    return model


def batch():
    return torch.randn(len(MIX), 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(model, x, names):
    """What a pass of its own gives for every sample."""
    before, outputs = model.active_domain, []
    for sample, name in zip(x, names, strict=True):
        model.set_domain(name)
        outputs.append(tree_map(_first, model(sample[None])))
    model.set_domain(before)
    return outputs


def _first(leaf):
    return leaf[0] if isinstance(leaf, torch.Tensor) else leaf


# --- one pass for all


@pytest.mark.parametrize("gate", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize(
    "name",
    [
        *("Residual", "Depthwise", "ConvHead", "SharedConv", "OtherAxes", "DictOutput"),
        *("transformer", "Island", "Segmentation"),
    ],
)
def test_every_sample_gets_what_a_pass_of_its_own_gives(name, gate):
    model = learned(name, gate)
    x = batch()
    expected = apart(model, x, MIX)
    got = model(x, domains=MIX)
    assert isinstance(got, list)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    others = apart(model, x, ["a", "c", "a", None, None])
    for one, other in zip(expected, others, strict=True):  # or the domains would be one
        if isinstance(one, torch.Tensor):
            assert one.shape != other.shape or (one - other).abs().max() > 1e-2


def test_heads_may_be_alike_and_all_samples_of_one_domain():
    model = learned(classes={"a": 4, "b": 4})
    x = batch()
    for names in (["a"] * 5, [None] * 5, ["b", "a", "b", "b", "a"]):
        torch.testing.assert_close(
            model(x, domains=names), apart(model, x, names), rtol=1e-4, atol=1e-5
        )
    assert model(x[:0], domains=[]) == []


def test_the_island_is_one():
    assert learned("Island").plan.python


def test_the_backbone_runs_once():
    model, sizes = learned(), []
    for layer in model.modules():
        if isinstance(layer, FrozenConv):
            layer.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    model(batch(), domains=MIX)
    assert sizes == [5] * 4


def test_the_executed_share_is_of_all_samples():
    model = learned()
    x, shares = batch(), []
    for sample, name in zip(x, MIX, strict=True):
        model.set_domain(name)
        model(sample[None])
        share = model.executed_flops_fraction
        shares.append(1.0 if share is None else share.item())
    assert len(set(shares)) > 2
    model(x, domains=MIX)
    assert model.executed_flops_fraction.item() == pytest.approx(sum(shares) / 5)


def test_batches_that_are_lists():
    model = learned("Lists")
    images = list(batch()[:2])
    both = [model(images, domains=[name] * 2) for name in "ab"]
    mixed = model(images, domains=["b", "a"])
    assert [entry["boxes"].shape for entry in mixed] == [(4, 4), (4, 5)]
    torch.testing.assert_close(mixed, [both[1][0], both[0][1]])
    assert (mixed[0]["boxes"] - both[0][0]["boxes"]).abs().max() > 1e-2


def test_under_autocast():
    model, x = learned(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model(x, domains=MIX), apart(model, x, MIX), rtol=0.05, atol=0.05
        )


def test_by_keyword():
    model = learned("Keywords")
    x = batch()
    torch.testing.assert_close(model(x=x, domains=MIX), model(x, domains=MIX), rtol=0, atol=0)


@pytest.mark.parametrize("active", ["a", None])
def test_everything_stays_as_it_was(active):
    model, x = learned(), batch()
    model.set_domain(active)

    def now():
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            return model.active_domain, trainable, model(x)

    before = now()
    model(x, domains=MIX)
    with refused(DomainError, "no domain 'z'"):
        model(x, domains=["a", "z", "a", "a", "a"])
    after = now()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


def test_copies_and_inference_mode():
    model, x = learned(), batch()
    expected = model(x, domains=MIX)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            torch.testing.assert_close(other(x, domains=MIX), expected, rtol=0, atol=0)


def test_mixing_is_for_inference():
    model, x = learned(), batch()
    assert not any(scores.requires_grad for scores in model(x, domains=MIX))
    model.train()
    with refused(InputError, "`domains` is for inference", "`eval()`", "DomainLoader"):
        model(x, domains=MIX)
    with torch.no_grad():
        assert len(model(x, domains=MIX)) == 5


def test_domains_that_do_not_fit_the_batch_are_refused():
    model, x = learned(), batch()
    with refused(InputError, "`domains` has 2 entries and the batch 5 samples"):
        model(x, domains=["a", "b"])
    for wrong in ("a", 3):
        with refused(InputError, f"got {wrong!r}", "'nearest'", "set_domain(name)"):
            model(x, domains=wrong)
    with refused(InputError, "takes batches of shape"):
        model(x[0], domains=["a"] * 3)
    with refused(InputError, "must be a batch", "NoneType"):
        model(None, domains=["a"])


def test_samples_that_cannot_be_told_apart_are_refused(capfd):
    with refused(InputError, "names 5 samples, but 'conv' works on 10 at once", "set_domain"):
        learned("Crops")(batch(), domains=MIX)
    with refused(InputError, "returns (4,) for 5 samples"):
        learned("SumOfTheBatch")(batch(), domains=MIX)
    assert learned("Crops")(batch(), domains=["a"] * 5)[0].shape == ()  # one domain: all the same
    model = learned()
    model._slots.head.register_forward_hook(lambda _, __, scores: scores.flatten(0).view(5, 7, 1))
    with refused(InputError, "heads have [3, 4, 5, 7] classes", "no output"):
        model(batch(), domains=MIX)
    assert not capfd.readouterr().err


# --- statistics


def features(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + 3.0


def test_few_features_have_a_whole_covariance():
    x, probe = features(200, 6), features(5, 6, seed=2)
    statistics = Statistics([4, 2])
    statistics.fit(x.split(30))
    covariance = x.double().T.cov()
    own = covariance.diagonal()
    usual = torch.cat([own[:4].mean().expand(4), own[4:].mean().expand(2)])
    floor = SHRINKAGE * torch.diag(own + SHRINKAGE * usual)
    gaussian = MultivariateNormal(x.double().mean(0), (1 - SHRINKAGE) * covariance + floor)
    torch.testing.assert_close(
        statistics.log_likelihood(probe), gaussian.log_prob(probe.double()), rtol=1e-4, atol=1e-4
    )


def test_many_features_keep_their_variances_and_what_they_share():
    x = features(500, 40)
    statistics = Statistics([40])
    statistics.fit([x])
    covariance = statistics.factors @ statistics.factors.T + torch.diag(statistics.variances)
    own = x.var(0)
    expected = own + SHRINKAGE**2 * own.mean()
    torch.testing.assert_close(covariance.diagonal(), expected, rtol=1e-4, atol=1e-4)
    assert statistics.factors.shape == (40, FACTORS)
    off = ~torch.eye(40, dtype=torch.bool)
    error = (covariance - x.T.cov())[off].norm() / x.T.cov()[off].norm()
    assert error < 0.3


def test_features_that_never_move_have_a_likelihood():
    x = features(3, 20)
    x[:, 5:] = 0.0
    statistics = Statistics([5, 15])
    statistics.fit([x])
    assert torch.isfinite(statistics.log_likelihood(features(4, 20))).all()


def test_statistics_of_nothing_are_refused():
    for batches in ([], [torch.ones(1, 3)]):
        with refused(InputError, "at least 2 samples", "iterator"):
            Statistics([3]).fit(batches)
    with refused(InputError, "NaN or infinite"):
        Statistics([3]).fit([torch.full((2, 3), float("nan"))])


# --- the nearest domain


def looks(name, count=20, seed=0):
    """Images of one domain: each has a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator) + 2.0 * "abc".index(name)


def with_statistics(name="Residual"):
    model = learned(name)
    for domain in model.domains:
        model.fit_statistics(domain, [(part, None) for part in looks(domain).split(8)])
    return model


@pytest.mark.parametrize("name", ["Residual", "transformer", "Island", "DictOutput"])
def test_the_nearest_domain(name):
    model = with_statistics(name)
    model.set_domain("b")
    names = ["c", "a", "a", "b", "c"]
    x = torch.cat([looks(n, 1, seed=10 + i) for i, n in enumerate(names)])
    assert model.nearest_domains(x) == names
    assert model.active_domain == "b"
    got = model(x, domains="nearest")
    torch.testing.assert_close(got, model(x, domains=names), rtol=0, atol=0)
    shake_(model, "a", 10.0)  # statistics are of the backbone
    assert model.nearest_domains(x) == names


def test_a_domain_may_be_called_nearest():
    model, x = learned(classes={"nearest": 3, "a": 3}), batch()[:2]
    names = ["nearest", "a"]
    torch.testing.assert_close(
        model(x, domains=names), apart(model, x, names), rtol=1e-4, atol=1e-5
    )


def test_the_nearest_needs_statistics_of_all():
    model = learned()
    model.fit_statistics("a", [looks("a")])
    for call in (model.nearest_domains, lambda x: model(x, domains="nearest")):
        with refused(DomainError, "['b', 'c'] have no statistics", "fit_statistics(name, batches)"):
            call(batch())
    with refused(DomainError, "There is no domain"):
        learned(classes={}).nearest_domains(batch())
    with refused(DomainError, "no domain 'z'"):
        model.fit_statistics("z", [batch()])
    with refused(InputError, "10 rows of features from 5 samples"):
        learned("Crops").fit_statistics("a", [batch()])
    with refused(InputError, "takes batches of shape"):
        model.fit_statistics("a", [batch()[0]])


def test_statistics_are_saved_with_their_domain(tmp_path):
    model, x = with_statistics(), torch.cat([looks(n, 3, seed=5) for n in "abc"])
    other = learned(classes={})
    for name in model.domains:
        model.save_domain(name, tmp_path / name)
        other.load_domain(tmp_path / name)
    for name in model.domains:
        ours, theirs = model.domain(name).state_dict(), other.domain(name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert other.nearest_domains(x) == model.nearest_domains(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.nearest_domains(x) == model.nearest_domains(x)


def test_a_file_without_statistics_loads():
    model = convert(v1.network(), v1.CONFIG)
    name = model.load_domain(FIXTURE)
    assert model.domain(name).statistics is None
    model.fit_statistics(name, [v1.images()])
    assert model.nearest_domains(v1.images()) == [name, name]


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    model = with_statistics()
    model.save_domain("a", tmp_path / "a")
    file = read_domain(tmp_path / "a")
    file.tensors["statistics.mean"] = torch.zeros(99)
    write_domain(tmp_path / "a", file.tensors, file.metadata)
    other = learned(classes={})
    with refused(CheckpointError, "'statistics.mean' has the shape (99,)"):
        other.load_domain(tmp_path / "a")
    assert other.domains == []


def test_statistics_in_state_dicts():
    model, bare, x = with_statistics(), learned(), batch()
    state = domain_state(model)
    for other in (learned(), learned(classes={})):  # one that has the domains, one that has not
        other.load_state_dict(state)
        assert other.nearest_domains(x) == model.nearest_domains(x)
    before = model.nearest_domains(x)
    model.load_state_dict(domain_state(bare))  # from before there were statistics: still right
    assert model.nearest_domains(x) == before
    assert torch.equal(model(x, domains=MIX)[0], bare(x, domains=MIX)[0])


def test_statistics_in_checkpoints_of_a_trainer(tmp_path):
    module, loader = lit.lit(), lit.data()
    trainer = lit.trainer(tmp_path, lit.callback("a"), epochs=1)
    trainer.fit(module, loader)
    module.net.fit_statistics("a", loader)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = load_from_checkpoint(lit.Lit, tmp_path / "x.ckpt")
    ours, theirs = (m.net.domain("a").statistics.state_dict() for m in (module, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
