"""Hidden states that transformers collects by hooks, which a forward hangs on its layers."""

import copy
import functools

import pytest
import torch

from lightning_da3 import AdapterConfig, DA3Config, MemoryConfig, convert

CONFIG = DA3Config(
    gate=None, adapter=AdapterConfig(4, min_stride=1), memory=MemoryConfig(exact=True)
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hooks(network):
    return [[dict(m._forward_hooks), dict(m._forward_pre_hooks)] for m in network.modules()]


@functools.cache
def wav2vec2(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        **options,
    )
    return transformers.Wav2Vec2ForSequenceClassification(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("option", [None, "use_weighted_layer_sum", "output_hidden_states"])
def test_hidden_states(option, called):
    network = copy.deepcopy(wav2vec2(**({option: True} if option else {})))
    x = torch.randn(2, 400)
    if called:
        network(x)
    before = hooks(network)
    model = convert(network, CONFIG, x, verify=True)
    assert not model.plan.python
    assert hooks(network) == before
    got, want = model(x), network(x)
    assert list(got) == list(want)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    if option == "output_hidden_states":
        torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_hidden_states_that_a_call_asks_for():
    network, x = copy.deepcopy(wav2vec2()), torch.randn(2, 400)
    model = convert(network, CONFIG, x, verify=False)
    with pytest.warns(UserWarning, match="traced once more"):
        got = model(x, output_hidden_states=True)
    want = network(x, output_hidden_states=True)
    assert len(got.hidden_states) == 3
    torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-4, atol=1e-5)


def gradient_of_states(network, x):
    x = x.clone().requires_grad_()
    states = network(x, output_hidden_states=True).hidden_states
    loss = sum((i + 1) * (h * h.detach().cos()).sum() for i, h in enumerate(states))
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*traced once more")
def test_gradients_of_hidden_states():
    network, x = copy.deepcopy(wav2vec2()).double(), torch.randn(2, 400).double()
    model = convert(network, CONFIG, x, verify=False)
    got, want = gradient_of_states(model, x), gradient_of_states(network, x)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * want.abs().max().item())
