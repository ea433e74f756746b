"""Domains found from the samples: statistics of features, kept with each domain."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from fixtures import v1
from helpers import lit
from helpers.domains import refused, shake_
from helpers.mixed import MIX, apart, batch, learned
from torch.distributions import MultivariateNormal

from lightning_da3 import (
    CheckpointError,
    DomainError,
    InputError,
    convert,
    load_from_checkpoint,
)
from lightning_da3.files.domain_file import read_domain, write_domain
from lightning_da3.model.state import domain_state
from lightning_da3.nn.statistics import FACTORS, SHRINKAGE, Statistics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1.safetensors"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
