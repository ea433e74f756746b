"""What PyTorch and Lightning do with any network works with a converted one, of every kind."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch
import torch._dynamo
from helpers import zoo
from helpers.comparing import (
    add,
    assert_gradients_close,
    assert_identical,
    assert_relatively_close,
    leaves,
    mix_gates_,
    score,
)
from helpers.marks import others_slow
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.memory import saved_activation_bytes

EXACT = MemoryConfig(exact=True)
ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, by="cell"), head=None)
# convolutions, regions, tokens; what stays Python with graphs inside
WHOLE = ["Transposed", "SqueezeExcite", "VisionTransformer"]
KINDS = [*WHOLE, "Detector"]
MODES = pytest.mark.parametrize("memory", [MemoryConfig(), EXACT], ids=["coded", "exact"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def converted(name, **choices):
    config = DA3Config(
        **{"adapter": ADAPTER, "gate": GateConfig(target=0.5, by="cell"), "head": None, **choices}
    )
    model = add(convert(zoo.network(name), config), "a")
    model.set_domain("a")
    mix_gates_(model, zoo.batch(name))
    return model.train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, name):
    return torch.autograd.grad(score(model(*zoo.batch(name))), trained(model))


# --- the compiler


def compiled_is_right(name, memory, backend, tolerance, kept_ratio=1.1, layout=None):
    torch._dynamo.reset()
    model = converted(name, memory=memory)
    if layout is not None:
        model.to(memory_format=layout)
    want, kept = gradients(model, name), saved_activation_bytes(model, *zoo.batch(name))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_relatively_close(compiled(*zoo.batch(name)), model(*zoo.batch(name)), 1e-4)
    assert_gradients_close(gradients(compiled, name), want, tolerance)
    assert saved_activation_bytes(compiled, *zoo.batch(name)) <= kept_ratio * kept


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param("SqueezeExcite", MemoryConfig(), marks=pytest.mark.slow),
        pytest.param("Transposed", EXACT, marks=pytest.mark.exhaustive),
        pytest.param("VisionTransformer", MemoryConfig(), marks=pytest.mark.exhaustive),
        pytest.param("SqueezeExcite", EXACT, marks=pytest.mark.exhaustive),
        pytest.param("Transposed", MemoryConfig(), marks=pytest.mark.exhaustive),
        pytest.param("VisionTransformer", EXACT, marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_whole(name, memory):
    compiled_is_right(name, memory, "aot_eager", 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_compiled_segment_keeps_codes():
    # eager and compiled gradients are both 5e-3 from the exact one here: what codes leave out
    compiled_is_right("LayerScale", MemoryConfig(), "aot_eager", 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("SqueezeExcite", None),
        ("Transposed", torch.contiguous_format),
    ],
)
def test_compiled_by_inductor(name, layout):
    """Its partitioner has a mind of its own of what to keep and what to compute again."""
    compiled_is_right(name, MemoryConfig(), "inductor", 1e-2, layout=layout)


# --- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_autocast(name, dtype):
    model = converted(name, gate=None)
    want = gradients(model, name)
    with torch.autocast("cpu", dtype):
        outputs = model(*zoo.batch(name))
    got = torch.autograd.grad(score([leaf.float() for leaf in leaves(outputs)]), trained(model))
    assert {gradient.dtype for gradient in got} == {torch.float32}
    assert_gradients_close(got, want, 0.2)


class Learner(L.LightningModule):
    def __init__(self, name, **choices):
        super().__init__()
        self.model = converted(name, **choices)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.model(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(trained(self.model), 0.05)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["SqueezeExcite", "VisionTransformer"])
def test_trainers_of_lower_precision(name, precision, tmp_path):
    learner = Learner(name)
    before = copy.deepcopy(learner.state_dict())
    data = TensorDataset(torch.randn(8, 3, 12, 12), torch.randint(5, (8,)))
    trainer = L.Trainer(
        max_epochs=2,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(learner, DataLoader(data, batch_size=4))
    after = learner.state_dict()
    moved = {
        k for k, v in before.items() if torch.is_tensor(v) and not torch.equal(v, after[k].to(v))
    }
    frozen = {k for k in moved if ".backbone." in k}
    assert any(".bank.a." in k for k in moved)
    assert precision == "bf16-true" or not frozen


# --- copies


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
@MODES
@pytest.mark.parametrize(
    "name", others_slow([*KINDS, "FunctionsWithOwnWeights", "Pair"], "SqueezeExcite", "Pair")
)
def test_a_copy_is_the_same_and_its_own(name, memory, duplicate):
    model = converted(name, memory=memory)
    twin = duplicate(model)
    want = gradients(model, name)
    assert_identical(gradients(twin, name), want)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_identical(gradients(model, name), want)
    twin.set_domain(None)
    assert model.active_domain == "a"


# --- the backbone's own state


@pytest.mark.parametrize(
    "name", [*KINDS, "ControlFlowOnShapes", "ControlFlowOnData", "CountsCalls", "Norms", "Hooks"]
)
def test_the_state_of_another_training_of_the_network_comes_in(name):
    model, other = convert(zoo.network(name), CONFIG), zoo.network(name).eval()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.25).add_(0.01)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_relatively_close(model(*zoo.batch(name)), other(*zoo.batch(name)), 1e-4)


@pytest.mark.parametrize("name", ["Parametrised", "OldWeightNorm", "StandardisedWeights"])
def test_the_state_of_a_network_that_computes_its_weights_is_refused(name):
    model = convert(zoo.network(name), CONFIG)
    with pytest.raises(CheckpointError, match=r"is computed from other tensors.*convert it again"):
        model.load_state_dict(zoo.network(name).state_dict())


# --- autograd


@MODES
@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_around_the_model(name, memory):
    model = converted(name, memory=memory)
    x = zoo.batch(name)
    outputs = checkpoint(model, *x, use_reentrant=False)
    got = torch.autograd.grad(score(outputs), trained(model))
    assert_gradients_close(got, gradients(model, name), 1e-5)


@MODES
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_a_second_backward_through_a_retained_graph(name, memory):
    model = converted(name, memory=memory)
    loss = score(model(*zoo.batch(name)))
    first = torch.autograd.grad(loss, trained(model), retain_graph=True)
    assert_identical(torch.autograd.grad(loss, trained(model)), first)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_accumulate(name):
    model = converted(name, gate=None)
    for _ in range(2):
        score(model(*zoo.batch(name))).backward()
    twice = [p.grad / 2 for p in trained(model)]
    assert_gradients_close(twice, gradients(model, name), 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_derivative_of_a_gradient_is_refused(name):
    model = converted(name)
    loss = score(model(*zoo.batch(name)))
    found = torch.autograd.grad(loss, trained(model), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.square().sum() for gradient in found).backward()


@pytest.mark.parametrize("name", WHOLE)
def test_transforms_of_functions_are_refused(name):
    model = converted(name)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return score(torch.func.functional_call(model, parameters, zoo.batch(name)))

    with pytest.raises(RuntimeError, match=r"torch.func|functorch|setup_context"):
        torch.func.grad(loss)(parameters)


def lent(model):
    """Other parameters, and the model's own as they would be in their place."""
    other = {n: p for n, p in model.named_parameters() if p.requires_grad}
    other = {n: (p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for n, p in other.items()}
    owner = copy.deepcopy(model)
    owner.load_state_dict(other, strict=False)
    return other, owner


@pytest.mark.parametrize("split", [None, Microbatches(1, 1)], ids=["whole", "again"])
@MODES
@pytest.mark.parametrize("name", [*KINDS, "Norms", "GatedLinearUnits"])  # hosts in regions
def test_parameters_lent_to_a_call_get_the_gradient_when_it_is_over(name, memory, split):
    model, batch = converted(name, memory=memory).double(), zoo.batch(name, torch.float64)
    model.budget_policy.split = split
    other, owner = lent(model)
    got = score(torch.func.functional_call(model, other, batch))
    got = torch.autograd.grad(got, list(other.values()))
    want = torch.autograd.grad(score(owner(*batch)), trained(owner))
    assert_gradients_close(got, want, 1e-9)  # float32 might have another 8-bit code


def transformed(model, x, transform):
    if transform == "jvp":
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    return torch.func.vmap(lambda sample: model(sample[None])[0])(x)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
@pytest.mark.parametrize("transform", ["jvp", "vmap"])
@pytest.mark.parametrize("name", [*WHOLE, "MLP"])
@pytest.mark.slow
def test_forward_mode_and_vmap_of_a_domain_are_refused(name, transform):
    with pytest.raises(RuntimeError, match="functorch transforms"):
        transformed(converted(name), *zoo.batch(name), transform)


@pytest.mark.filterwarnings("ignore")
def test_forward_mode_and_vmap_of_the_backbone_alone_are_right():
    model, (x,) = converted("MLP").double(), zoo.batch("MLP", torch.float64)
    model.set_domain(None)
    torch.testing.assert_close(transformed(model, x, "vmap"), model(x))
    difference = (model(x + 1e-6) - model(x - 1e-6)) / 2e-6
    torch.testing.assert_close(transformed(model, x, "jvp"), difference, rtol=1e-5, atol=1e-7)


def test_an_exported_network_needs_nothing_of_ours():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(1))
    x = torch.randn(2, 3, 6, 6)
    model = convert(network.eval(), DA3Config(head=None), x).eval()
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("conv" in target for target in targets)
    assert not [target for target in targets if "lightning_da3" in target]
    assert_relatively_close([program.module()(x)], [network(x)], 1e-5)
