"""Files of domains that skip branches hold a smaller network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.domains import refused
from helpers.skips import converted, images

from lightning_da3 import ConfigError, MemoryConfig
from lightning_da3.device import Learner

BRANCHES = ["blocks.0", "blocks.2"]


def model_that_skips():
    model = converted("a", "b").eval()
    model.skip("a", BRANCHES)
    return model


def test_inference(tmp_path):
    model, x = model_that_skips(), images(3)
    paths = {n: model.export(n, tmp_path / f"{n}.pt2", x, format="pt2") for n in "ab"}
    model.set_domain("a")
    close = {"rtol": 1e-5, "atol": 1e-6}
    programs = {n: torch.export.load(path) for n, path in paths.items()}
    torch.testing.assert_close(programs["a"].module()(x)[0], model(x), **close)
    nodes = {n: len(p.graph.nodes) for n, p in programs.items()}
    assert nodes["a"] < 0.8 * nodes["b"]
    assert paths["a"].stat().st_size < 0.8 * paths["b"].stat().st_size
    torch.testing.assert_close(model(x), model.run_domain("a", x), **close)


def test_inference_in_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, x = model_that_skips(), images(3)
    paths = {n: model.export(n, tmp_path / f"{n}.onnx", x) for n in "ab"}
    got = runtime.InferenceSession(paths["a"]).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(got, model.run_domain("a", x).detach(), rtol=1e-4, atol=1e-5)
    assert paths["a"].stat().st_size < 0.8 * paths["b"].stat().st_size


def test_one_file_for_all_domains_is_for_those_that_skip_nothing(tmp_path):
    model, x = model_that_skips(), images(3)
    with refused(ConfigError, "'a' skips ['blocks.0', 'blocks.2']", "Say domains='inside'"):
        model.export("a", tmp_path / "a.pt2", x, format="pt2", domains="inputs")
    assert model.export("b", tmp_path / "b.pt2", x, format="pt2", domains="inputs").exists()


def test_training(tmp_path):
    pytest.importorskip("onnxruntime")
    model, x, labels = model_that_skips(), images(4), torch.arange(4) % 3
    before = {n: v.clone() for n, v in model.domain("a").state_dict().items()}
    paths = {n: model.export_training(n, tmp_path / f"{n}.onnx", x) for n in "ab"}
    assert paths["a"].stat().st_size < 0.8 * paths["b"].stat().st_size
    learner = Learner(paths["a"])
    for _ in range(2):
        learner.step(x.numpy(), labels.numpy(), 0.05)
    learner.save(tmp_path / "learned.safetensors")
    model.load_domain(tmp_path / "learned.safetensors", "c")
    assert model.skipped("c") == tuple(BRANCHES)
    model.set_domain("a")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    learned, own = model.domain("c").state_dict(), model.domain("a").state_dict()
    for name, value in own.items():
        torch.testing.assert_close(learned[name], value, rtol=1e-3, atol=1e-4, msg=name)
        closed = any(f"{h.replace('.', '__')}." in name for h in model.domain("a").closed)
        assert torch.equal(value, before[name]) == closed, name
    assert model.config.memory == MemoryConfig()
