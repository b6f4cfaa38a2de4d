"""Generated adapters: the paper's formula, what a step costs, how ids reach the sites, and tasks that come later."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastadapt.nn import HyperAdapter, ParallelAdapter, freeze_except
from fastadapt.ops.bottleneck import ACTIVATIONS

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import gradients, pooled

D, R, E, H, LAYERS, POSITIONS = 24, 5, 8, 12, 2, 2
TASKS = ["cola", "sst2", "mnli"]
over_norms = pytest.mark.parametrize("norm", ["post", "pre", None])


def make(norm="post", tasks=TASKS, **options):
    """All generated weights away from zero and from each other."""
    options = {"embedding": E, "hidden": H, "init_std": 0.3, "device": DEVICE, **options}
    hyper = HyperAdapter(tasks, LAYERS, D, R, norm=norm, **options)
    with torch.no_grad():
        for name, parameter in hyper.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return hyper


class Stack(nn.Module):
    """Layers with an adapter at both positions of each."""

    def __init__(self, hyper, checkpointed=False):
        super().__init__()
        self.hyper, self.checkpointed = hyper, checkpointed
        self.linears = nn.ModuleList(nn.Linear(D, D, device=DEVICE) for _ in range(LAYERS))
        self.sites = nn.ModuleList(hyper.site(i, j) for i in range(LAYERS) for j in range(POSITIONS))

    def block(self, i, x):
        x = self.sites[POSITIONS * i](x)
        return self.sites[POSITIONS * i + 1](torch.tanh(self.linears[i](x)), residual=x)

    def forward(self, x):
        for i in range(LAYERS):
            x = checkpoint(self.block, i, x, use_reentrant=False) if self.checkpointed else self.block(i, x)
        return x


def one_adapter(hyper, task, layer, position, x, residual):
    """The paper's formula for one place and one task, row by row the same."""
    embeddings = hyper.task_embeddings[task], hyper.layer_embedding.weight[layer], hyper.position_embedding.weight[position]
    first, _, second, norm = hyper.condition
    condition = norm(second(torch.relu(first(torch.cat(embeddings)))))
    sizes = [R * D, D * R, R, D, D, D][: 6 if hyper.norm else 4]
    down, up, down_bias, up_bias, *affine = hyper.generator(condition).split(sizes)
    if hyper.norm == "pre":
        x = F.layer_norm(x, (D,), 1 + affine[0], affine[1], hyper.norm_eps)
    y = ACTIVATIONS[hyper.activation](F.linear(x, down.view(R, D), down_bias))
    y = F.linear(y, up.view(D, R), up_bias)
    return residual + (F.layer_norm(y, (D,), *affine, hyper.norm_eps) if hyper.norm == "post" else y)


def formula(ids, model, x):
    """``Stack`` by the formula, with an id for each token of ``x``."""
    hyper = model.hyper

    def place(layer, position, x, residual):
        y = residual.clone()
        for i, task in enumerate(hyper.names):
            at = (ids == i).nonzero(as_tuple=True)
            y = y.index_put(at, one_adapter(hyper, task, layer, position, x[at], residual[at]))
        return y

    for i, linear in enumerate(model.linears):
        x = place(i, 0, x, x)
        x = place(i, 1, torch.tanh(linear(x)), x)
    return x + sum(0 * p.sum() for p in model.parameters())  # what has no part in it has gradients of zero


def through(ids, model, x):
    with model.hyper.use(ids):
        return model(x) + sum(0 * p.sum() for p in model.parameters())


SHAPE = 4, 3
IDS = {
    "sequences": torch.tensor([1, -1, 0, 1]),
    "tokens": torch.tensor([[1, -1, 0], [0, 2, 1], [-1, -1, -1], [1, 0, 1]], dtype=torch.int32),
    "name": "sst2",
    "id": 1,
    "0-d": torch.tensor(1, dtype=torch.int32),
}


def on_device(ids):
    return ids.to(DEVICE) if isinstance(ids, torch.Tensor) else ids


def of_tokens(ids, shape=SHAPE):
    ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(1)
    return ids.to(DEVICE).reshape(ids.shape + (1,) * (2 - ids.dim() if ids.dim() else 0)).expand(shape)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@over_norms
def test_equals_the_formula(norm, ids):
    """Outputs and gradients of the input, the embeddings and the network."""
    model = Stack(make(norm)).double()
    x, grad_y = torch.randn(2, *SHAPE, D, device=DEVICE, dtype=torch.float64)
    tokens, ids = of_tokens(ids), on_device(ids)
    oracle = gradients(partial(formula, tokens), model, grad_y, x)
    for name, value in gradients(partial(through, ids), model, grad_y, x).items():
        torch.testing.assert_close(value, oracle[name], rtol=1e-9, atol=1e-11)


@over_norms
def test_float32(norm):
    """The kernel errs no more than the same folds in plain PyTorch do."""

    def place(hyper, x):
        return hyper.adapt(x, hyper(ids)[1][0]) + sum(0 * p.sum() for p in hyper.parameters())

    hyper, ids = make(norm), torch.tensor([1, -1, 0, 2], device=DEVICE)
    double, plain = copy.deepcopy(hyper).double(), copy.deepcopy(hyper)
    plain.backend = "reference"
    x, grad_y = torch.randn(2, 8, *SHAPE, D, device=DEVICE)
    oracle = pooled(partial(gradients, place, double), grad_y.double(), x.double())
    expected, actual = (pooled(partial(gradients, place, h), grad_y, x) for h in (plain, hyper))
    for name, exact in oracle.items():
        assert_within_reference_error(actual[name], expected[name], exact, name)


@over_norms
def test_fewer_sequences_than_tasks(norm):
    """An adapter is generated for each sequence, no more, and the result is the same."""
    hyper = make(norm, 6)
    model, ids = Stack(hyper).double(), torch.tensor([4, -1, 0, 4], device=DEVICE)
    assert hyper(ids)[0][0].down_weight.shape == (4, R, D) and hyper(ids)[1][1].adapter_ids.tolist() == [0, -1, 2, 3]
    x, grad_y = torch.randn(2, *SHAPE, D, device=DEVICE, dtype=torch.float64)
    oracle = gradients(partial(formula, of_tokens(ids)), model, grad_y, x)
    for name, value in gradients(partial(through, ids), model, grad_y, x).items():
        torch.testing.assert_close(value, oracle[name], rtol=1e-9, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_one_product_generates_everything():
    """Two small products make the conditions, one the weights of all places and tasks; the sites make none."""
    model, ids = Stack(make()), torch.tensor([1, 2, 0, 1], device=DEVICE)
    with torch.no_grad(), Products() as products, model.hyper.use(ids):
        assert products.count == 3
        for linear in model.linears:
            linear.forward = lambda x: x
        model(torch.randn(*SHAPE, D, device=DEVICE))
        assert products.count == 3


def test_parameters():
    """Their number: a task costs an embedding. Their names: those of the sites aren't among them."""
    hyper = HyperAdapter(TASKS, 6, 384, 12)
    a_place = 2 * 12 * 384 + 12 + 3 * 384
    network = (3 * 64 + 1) * 128 + (128 + 1) * 64 + 2 * 64 + (64 + 1) * a_place
    assert sum(p.numel() for p in hyper.parameters()) == (3 + 6 + 2) * 64 + network
    before = sum(p.numel() for p in hyper.parameters())
    hyper.add_task("qqp")
    assert sum(p.numel() for p in hyper.parameters()) == before + 64
    model = Stack(make())
    names = ["condition.0", "condition.2", "condition.3", "generator"]
    keys = ["layer_embedding.weight", "position_embedding.weight", *(f"{n}.{p}" for n in names for p in ("weight", "bias"))]
    keys += [f"task_embeddings.{task}" for task in TASKS]
    assert sorted(k for k in model.state_dict() if "linears" not in k) == sorted(f"hyper.{key}" for key in keys)
    assert set(freeze_except(model, "hyper")) == {f"hyper.{key}" for key in keys}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_norms
def test_new_adapters_are_the_identity_and_learn(norm, dtype):
    hyper = HyperAdapter(TASKS, LAYERS, D, R, norm=norm, device=DEVICE, dtype=dtype)
    x = torch.randn(3, D, device=DEVICE).to(dtype)
    for ids in ("cola", torch.tensor([0, 2, -1], device=DEVICE)):
        with hyper.use(ids):
            y = hyper.site(1, 0)(x)
        assert torch.equal(y, x) and y.dtype == dtype
    y.square().sum().backward()
    assert hyper.generator.weight.grad.any()
    paper = HyperAdapter(1, 1, D, R, init_std=1e-2)
    assert abs(paper.generator.weight.std() - 0.01) < 1e-3 and not paper.generator.bias.any()


def test_checkpointing_inside_the_block():
    model, ids = Stack(make()), torch.tensor([1, -1, 0, 2], device=DEVICE)
    x, results = torch.randn(*SHAPE, D, device=DEVICE, requires_grad=True), []
    for checkpointed in (False, True):
        model.checkpointed = checkpointed
        model.zero_grad()
        with model.hyper.use(ids):
            model(x).square().sum().backward()
        results.append([p.grad for p in model.hyper.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    with model.hyper.use(ids):
        y = model(x)
    with pytest.raises(RuntimeError, match="layer 1, position 0 has no weights: .*checkpointing its backward pass, inside"):
        y.sum().backward()


def test_ids_reach_the_sites():
    """Blocks nest, ``set_ids`` lasts until the next one, and outside of both a site refuses."""
    hyper = make()
    site, x = hyper.site(1, 1), torch.randn(*SHAPE, D, device=DEVICE)
    for refused in range(2):
        with pytest.raises(RuntimeError, match=r"layer 1, position 1 has no weights: .*with hyper.use\(adapter_ids\)"):
            site(x)
        if refused:
            break
        with hyper.use("cola"):
            first = site(x)
            with hyper.use("mnli"):
                assert not torch.allclose(site(x), first)
            assert torch.equal(site(x), first)
    hyper.set_ids(hyper.ids(["cola", None, "mnli", "cola"]))
    y = site(x)
    torch.testing.assert_close(y[[0, 3]], first[[0, 3]])
    assert torch.equal(y[1], x[1])
    outer = hyper.set_ids("cola")
    assert torch.equal(site(x), first) and hyper.set_ids(outer)[1][1].adapter_ids is None
    assert torch.equal(site(x), y)
    assert hyper.set_ids(None) is outer
    with pytest.raises(RuntimeError, match="has no weights"):
        site(x)
    with torch.no_grad():
        served = hyper("cola")
    with Products() as products, hyper.use(served):
        assert torch.equal(site(x), first) and products.count == 0


def test_tasks_that_come_later():
    hyper = make()
    x, mean = torch.randn(3, D, device=DEVICE), torch.stack(tuple(hyper.task_embeddings.values())).mean(0)
    with hyper.use("mnli"):
        before = hyper.site(0)(x)
    assert hyper.add_task("qqp") == 3 and hyper.add_task("rte", like="mnli", freeze=True) == 4
    assert torch.equal(hyper.task_embeddings["qqp"], mean) and hyper.names == [*TASKS, "qqp", "rte"]
    with hyper.use("rte"):
        y = hyper.site(0)(x)
        assert torch.equal(y, before)
        y.square().sum().backward()
    trained = [name for name, p in hyper.named_parameters() if p.requires_grad]
    assert trained == ["task_embeddings.rte"] and hyper.task_embeddings["rte"].grad.any()
    torch.optim.SGD(hyper.parameters(), lr=0.1).step()
    with hyper.use(hyper.ids(["mnli", "rte", None])):
        y = hyper.site(0)(x)
    torch.testing.assert_close(y[0], before[0])
    assert not torch.allclose(y[1], before[1]) and torch.equal(y[2], x[2])
    other = make(tasks=hyper.names)
    other.load_state_dict(hyper.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*task_embeddings.sst5"):
        make(tasks=[*hyper.names, "sst5"]).load_state_dict(hyper.state_dict())


@over_norms
def test_float32_parameters_serve_bfloat16_activations(norm):
    """Autocast changes neither the dtype nor the precision of what is generated."""
    model, x = Stack(make(norm)), torch.randn(*SHAPE, D, device=DEVICE).bfloat16()
    site = model.sites[0]
    for ids in ("cola", torch.tensor([1, -1, 0, 2], device=DEVICE)):
        with model.hyper.use(ids):
            y, wide = site(x), site(x.float())
        with torch.autocast(DEVICE, dtype=torch.bfloat16), model.hyper.use(ids):
            assert torch.equal(site(x), y) and torch.equal(site(x.float()), wide)
        assert y.dtype == torch.bfloat16 and wide.dtype == torch.float32


@pytest.mark.parametrize("ids", ["sequences", pytest.param("name", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_compiles_without_graph_break(norm, ids):
    """Without state."""
    torch._dynamo.reset()
    hyper, ids = make(norm), on_device(IDS[ids])
    x, grad_y = torch.randn(2, *SHAPE, D, device=DEVICE)

    def stateless(hyper, x):
        return hyper.adapt(x, hyper(ids)[0][1]) + sum(0 * p.sum() for p in hyper.parameters())

    expected = gradients(stateless, hyper, grad_y, x)
    for name, value in gradients(torch.compile(stateless, fullgraph=True, backend="aot_eager"), hyper, grad_y, x).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.slow
def test_compiles_with_a_block_around_the_model():
    torch._dynamo.reset()
    model, ids = Stack(make()), torch.tensor([1, -1, 0, 2], device=DEVICE)
    x = torch.randn(*SHAPE, D, device=DEVICE)
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, model, x), through(ids, model, x))


def test_copies_and_files():
    """A copy of a model has sites of its own; a sublayer may have a site beside it."""
    model, x = Stack(make()), torch.randn(*SHAPE, D, device=DEVICE)
    with model.hyper.use("sst2"):
        y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with other.hyper.use("sst2"):
            assert torch.equal(other(x), y)
            with pytest.raises(RuntimeError, match="has no weights"):
                model(x)
    beside = ParallelAdapter(model.linears[0], model.hyper.site(0, 1))
    with model.hyper.use("sst2"):
        torch.testing.assert_close(beside(x), model.sites[1](x, residual=model.linears[0](x)))
    assert "tasks=['cola', 'sst2', 'mnli'], layers=2" in repr(model) and "layer=1, position=0" in repr(model)


def test_bad_input():
    hyper, x = make(), torch.randn(4, D, device=DEVICE)
    known = r"task must be one of \['cola', 'sst2', 'mnli'\] or an id from 0 to 2, got "
    for call, error, message in (
        (lambda: hyper("mrpc"), ValueError, known + "'mrpc'"),
        (lambda: hyper(3), ValueError, known + "3"),
        (lambda: hyper.ids(["cola", -1]), ValueError, known + "-1"),
        (lambda: hyper.add_task("rte", like="mrpc"), ValueError, known + "'mrpc'"),
        (lambda: hyper.add_task("sst2"), ValueError, "a task's name must be a new one, got 'sst2', which is among"),
        (lambda: hyper.add_task("a.b"), ValueError, "a task's name must be a string .*got 'a.b'"),
        (lambda: hyper.add_task("keys"), ValueError, "a task's name must be a string .*got 'keys'"),
        (lambda: hyper.add_task("training"), ValueError, "a task's name must be a string .*got 'training'"),
        (lambda: hyper.add_task(4), ValueError, "a task's name must be a string .*got 4"),
        (lambda: hyper([0, 1]), TypeError, "adapter_ids must be an integer tensor, .*got list"),
        (lambda: hyper.set_ids(("cola", "sst2")), TypeError, "adapter_ids must be an integer tensor, .*got tuple"),
        (lambda: hyper(torch.ones(4)), TypeError, "adapter_ids must be an integer tensor, .*got torch.float32"),
        (lambda: hyper.site(2, 0), IndexError, r"layer must lie in \[0, 1\], got 2"),
        (lambda: hyper.site(0, -1), IndexError, r"position must lie in \[0, 1\], got -1"),
        (lambda: hyper.site("0"), TypeError, "layer must be an integer, got str"),
        (lambda: HyperAdapter([], 1, D, R), ValueError, "tasks must be a number or the names of at least one"),
        (lambda: HyperAdapter("cola", 1, D, R), TypeError, "tasks must be a number or a sequence of names, got str"),
        (lambda: HyperAdapter(None, 1, D, R), TypeError, "tasks must be a number or a sequence of names, got NoneType"),
        (lambda: HyperAdapter(0, 1, D, R), ValueError, "tasks must be at least 1, got 0"),
        (lambda: HyperAdapter(2, 1, D, 0), ValueError, "r must be at least 1, got 0"),
        (lambda: HyperAdapter(2, 1, D, R, norm="both"), ValueError, "norm must be one of"),
        (lambda: HyperAdapter(2, 1, D, R, activation="abs"), ValueError, "activation must be one of"),
        (lambda: HyperAdapter(2, 1, D, R, init_std=0.0), ValueError, "init_std must be None or a positive number"),
    ):
        with pytest.raises(error, match=message):
            call()
    if DEVICE == "cpu":
        for ids, range_ in ((torch.tensor([0, 3]), r"\[-1, 2\]"), (torch.tensor(-1), r"\[0, 2\]")):
            with pytest.raises(ValueError, match=f"adapter_ids must lie in {range_} for the tasks .*got"):
                hyper(ids)
    with hyper.use(hyper.ids(["cola"])), pytest.raises(ValueError, match=r"adapter_ids must be \(4,\)"):
        hyper.site(0)(x)
