"""timm's families: each converts, computes the same, has the right gradients and keeps far less."""

import pytest
import torch
from helpers.comparing import add, assert_relatively_close, mix_gates_, score
from helpers.marks import others_by_hand
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert
from lightning_da3.memory import saved_activation_bytes
from lightning_da3.reference import PlainPyTorch

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning")

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16)
QUICK = {"resnet10t": 64, "mobilenetv3_small_050": 96, "convnext_atto": 64, "regnety_002": 64}
SLOW = {
    "vit_tiny_patch16_224": 64,
    "efficientnet_b0": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 64,
    "coatnet_pico_rw_224": 64,
    "mixer_s32_224": 224,
    "edgenext_xx_small": 64,
    "ghostnet_050": 96,
    "hrnet_w18_small": 64,
    "nf_regnet_b0": 64,
    "xcit_nano_12_p16_224": 64,
    "pvt_v2_b0": 64,
    "mobilevit_xxs": 64,
    "coat_lite_tiny": 64,
    "efficientvit_b0": 64,
    "tf_efficientnet_lite0": 64,
}
EXHAUSTIVE = {
    "tiny_vit_5m_224": 64,
    "mobilenetv4_conv_small_035": 96,
    "eva02_tiny_patch14_224": 56,
    "swinv2_tiny_window8_256": 64,
    "maxvit_pico_rw_256": 64,
    "densenet121": 64,
    "gmlp_ti16_224": 224,
    "poolformer_s12": 64,
    "caformer_s18": 64,
    "fastvit_t8": 64,
    "mobileone_s0": 64,
    "repvgg_a0": 64,
    "dla46_c": 96,
    "resmlp_12_224": 224,
    "cs3darknet_focus_s": 64,
    "res2net50_14w_8s": 64,
    "skresnet18": 64,
    "ese_vovnet19b_slim_dw": 64,
    "xception41": 64,
    "inception_v4": 96,
    "visformer_tiny": 224,
    "davit_tiny": 64,
    "hiera_tiny_224": 224,
    "nextvit_small": 64,
    "repghostnet_050": 96,
    "convmixer_768_32": 64,
    "twins_svt_small": 64,
    "crossvit_tiny_240": 240,
}
SIZES = {**QUICK, **SLOW, **EXHAUSTIVE}
NAMES = [
    "resnet10t",
    *others_by_hand([name for name in SIZES if name != "resnet10t"], "efficientnet_b0"),
]
COSINE = 0.996  # of the gradient of every tensor
TOGETHER = 0.9999  # of all gradients as one
SENSITIVE = {  # both of these
    "coat_lite_tiny": (0.995, TOGETHER),
    "efficientvit_b0": (0.995, 0.9995),  # divides by sums of what it codes
    "fastvit_t8": (0.995, TOGETHER),
    "vit_tiny_patch16_224": (0.985, TOGETHER),  # of one tensor; all others have 0.9997
}
EXACT = 1e-7  # PyTorch's own derivative of Hardsigmoid has its 1/6 in float32
SINGLE = {"efficientvit_b0": 1e-5}  # attention in float32, whatever comes
HEADLESS = ("crossvit_tiny_240", "deit_tiny_distilled_patch16_224")  # means of two heads


def network(name):
    """The smallest of its family, with weights and statistics as training leaves them."""
    torch.manual_seed(0)
    try:
        net = timm.create_model(name, num_classes=5, img_size=SIZES[name])
    except TypeError:  # takes images of any size
        net = timm.create_model(name, num_classes=5)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:  # layer scale, and what begins as zero
                parameter.uniform_(0.2, 0.6)
        for norm in norms:
            norm.momentum = 1.0
        net.train()(torch.randn(4, 3, SIZES[name], SIZES[name]))
        for norm in norms:
            norm.momentum = 0.0  # from now on as it is
    return net.eval()


def converted(net, x, **choices):
    config = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"), **choices)
    model = add(convert(net, config, x, verify=False), "a")
    model.set_domain("a")
    mix_gates_(model, (x,))
    with torch.no_grad():
        for adapter in model.domain("a").adapters.values():
            adapter.attend.bias += 1e-4  # no gate is on the edge, where rounding decides
    return model.train()


@pytest.mark.parametrize("name", NAMES)
def test_family(name):
    net = network(name)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    model = convert(net, DA3Config(adapter=ADAPTER), x)
    assert model.plan.hosts
    assert (model.plan.head is None) is (name in HEADLESS)
    assert not model.plan.python
    with torch.no_grad():
        assert_relatively_close(model(x), net(x), 2e-4)
    model = converted(net, x)
    fine_tuning = saved_activation_bytes(net.train(), x)
    assert fine_tuning > 5 * saved_activation_bytes(model, x)

    net, x = net.eval().double(), x.double()
    exact, coded = converted(net, x, memory=MemoryConfig(exact=True)), converted(net, x)
    plain = PlainPyTorch(net, exact, example_inputs=(x,))
    exact.gate_loss_scale = coded.gate_loss_scale = 1.0  # as `plain.loss` is added
    got, want, close = (
        torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad])
        for m, loss in (
            (exact, score(exact(x))),
            (exact, score(plain(x)) + plain.loss()),
            (coded, score(coded(x))),
        )
    )
    largest = max(gradient.norm() for gradient in want)
    for one, other in zip(got, want, strict=True):
        error = SINGLE.get(name, EXACT)
        assert (one - other).norm() <= error * max(other.norm(), 1e-4 * largest)
    cosines = [
        float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
        for one, other in zip(close, want, strict=True)
        if other.norm() > 5e-3 * largest
    ]
    together = [torch.cat([g.flatten() for g in gradients]) for gradients in (close, want)]
    least, whole = SENSITIVE.get(name, (COSINE, TOGETHER))
    assert min(cosines) >= least
    assert torch.cosine_similarity(*together, dim=0) >= whole
