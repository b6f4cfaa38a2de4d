"""Side networks: the formulas of the papers, and nothing of the frozen model kept for the backward pass."""

import collections
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.nn import BottleneckAdapter, LadderSideNetwork, SideNetwork, freeze_except, load_adapters, save_adapters

from .battery import DEVICE

D, B, T, LAYERS, WORDS = 32, 3, 7, 2, 13
Output = collections.namedtuple("Output", ["hidden", "other"])


class Recorder(TorchDispatchMode):
    """Keeps the storages of all that is computed."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.storages[t.untyped_storage().data_ptr()] = t  # alive, or its address would be given anew
        return out


class Trunk(nn.Module):
    """A transformer of ``layers`` layers, ``wrap`` being what it returns its hidden states in."""

    def __init__(self, layers=LAYERS, ffn=2 * D, wrap=lambda y: y, dropout=0.1):
        super().__init__()
        self.words = nn.Embedding(WORDS, D)
        options = {"batch_first": True, "norm_first": True, "dropout": dropout}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(D, 4, ffn, **options) for _ in range(layers))
        self.wrap, self.recorder = wrap, None

    def forward(self, ids):
        with self.recorder or torch.no_grad():
            x = self.words(ids)
            for layer in self.layers:
                x = layer(x)
            return self.wrap(x)


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module.to(DEVICE)


def ids(b=B, t=T):
    return torch.randint(WORDS, (b, t), device=DEVICE)


WRAPS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "a"),
    "named": lambda y: Output(y, 1),
    "mapping": lambda y: {"hidden": y, "other": 1},
}


def hidden(out):
    return out if isinstance(out, torch.Tensor) else next(iter(out.values() if isinstance(out, dict) else out))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_side_tuning_is_a_blend(wrap, learned):
    base, side = Trunk(wrap=wrap), nn.Sequential(nn.Embedding(WORDS, D), nn.Linear(D, D))
    module = SideNetwork(base, side, alpha=0.8, learned=learned).to(DEVICE, torch.float64)
    x, share = ids(), module.share
    torch.testing.assert_close(torch.as_tensor(share, device="cpu"), torch.tensor(0.8, dtype=torch.float64), check_dtype=False)
    out, below = module(x), base(x)
    assert type(out) is type(below)
    y, frozen = hidden(out), hidden(below)
    expected = 0.8 * frozen + (1 - 0.8) * side(x)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    trained = freeze_except(nn.Sequential(module), "side")
    assert set(trained) == {"0.side.0.weight", "0.side.1.weight", "0.side.1.bias"} | ({"0.alpha"} if learned else set())
    grads = torch.autograd.grad(y, list(side.parameters()), grad_y, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(side.parameters()), grad_y, retain_graph=True))
    if learned:  # the slope of the sigmoid at 0.8
        slope = torch.autograd.grad(y, module.alpha, grad_y)[0]
        torch.testing.assert_close(slope.squeeze(), 0.8 * 0.2 * (grad_y * (frozen - side(x))).sum())


def attention(x, block, seen):
    q, k, v = (y.unflatten(-1, (block.h, -1)).transpose(1, 2) for y in block.qkv(block.norm(x)).chunk(3, -1))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    x = x + block.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + block.ffn[2](F.gelu(block.ffn[0](block.ffn_norm(x))))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_ladder_is_that_of_the_paper(residual, causal, padded):
    base = Trunk()
    module = randomised(LadderSideNetwork(base, D, reduction=4, h=2, causal=causal, residual=residual)).double()
    assert module.train().training and not base.training  # no dropout
    x, mask = ids(), torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    if padded:
        mask[0, 4:] = mask[1, :2] = False
    y = module(x, side_mask=mask if padded else None)
    states = [base.words(x)]
    for layer in base.layers:
        states.append(layer(states[-1]))
    seen = torch.ones(T, T, dtype=torch.bool, device=DEVICE)
    seen = (seen.tril() if causal else seen) & mask[:, None, None] | torch.eye(T, dtype=torch.bool, device=DEVICE)
    mu = torch.sigmoid(module.alpha / 0.1)
    h = module.down[0](states[0])
    for i, block in enumerate(module.blocks):
        h = attention(mu[i] * h + (1 - mu[i]) * module.down[i + 1](states[i + 1]), block, seen)
    expected = module.up(module.norm(h)) + (states[-1] if residual else 0)
    torch.testing.assert_close(y, expected)
    trained = list(freeze_except(nn.Sequential(module), "side").values())
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, trained, grad_y) for out in (y, expected)))


def test_a_new_ladder_changes_nothing_and_learns():
    base = Trunk().to(DEVICE)
    module, x = LadderSideNetwork(base, D, reduction=4).to(DEVICE), ids()
    assert torch.equal(module(x), base.eval()(x))
    module(x).square().sum().backward()
    assert module.up.weight.grad.any() and all(p.grad is None for p in base.parameters())
    assert LadderSideNetwork(base, D, reduction=4, residual=False).up.weight.any()


def saved(module, x):
    """What is kept for the backward pass, by storage, but for parameters; and what the frozen model has computed."""
    base, kept = module.base, []
    base.recorder = Recorder()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    computed, base.recorder = base.recorder.storages, None
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {t.untyped_storage().data_ptr(): t for t in kept}
    assert y.requires_grad
    return {key: t for key, t in storages.items() if key not in own}, computed


@pytest.mark.parametrize("learned", [True, False])
def test_side_tuning_keeps_nothing_of_the_base(learned):
    side = nn.Sequential(nn.Embedding(WORDS, D), nn.Linear(D, D))
    kept, computed = saved(SideNetwork(Trunk(), side, learned=learned).to(DEVICE), ids())
    assert not kept.keys() & computed.keys()
    states = [t for t in kept.values() if t.untyped_storage().nbytes() >= B * T * D * 4]
    assert len(states) == 1 + learned  # the input of the linear layer, and the difference of the outputs


def test_a_ladder_keeps_the_tapped_states_alone():
    x, amounts = ids(), []
    for layers, ffn in ((2, D), (2, 8 * D), (6, D)):
        module = LadderSideNetwork(Trunk(layers, ffn), D, reduction=4, layers=["layers.0", "layers.1"]).to(DEVICE)
        states = []
        for layer in module.base.layers[:2]:
            layer.register_forward_pre_hook(lambda layer, args, states=states: states.append(args[0]))
        module.base.layers[1].register_forward_hook(lambda layer, args, y, states=states: states.append(y))
        kept, computed = saved(module, x)
        tapped = {t.untyped_storage().data_ptr() for t in states}
        assert len(tapped) == 3 and kept.keys() & computed.keys() == tapped
        amounts.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    assert len(set(amounts)) == 1  # whatever the depth and the width of the base
    for p in module.down.parameters():
        p.requires_grad_(False)
    kept, computed = saved(module, x)
    assert not kept.keys() & computed.keys()


def peak(model, x):
    """The most bytes that the tensors of a step hold together, by PyTorch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x).square().sum().backward()
    alive = most = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_peak_memory_does_not_grow_with_the_base():
    b, t, shallow, deep = 2, 64, Trunk(2, dropout=0.0), Trunk(5, dropout=0.0)
    x, state = torch.randint(WORDS, (b, t)), 4 * b * t * D
    peaks = [peak(LadderSideNetwork(base, D, reduction=4, layers=["layers.0", "layers.1"]), x) for base in (shallow, deep)]
    assert peaks[1] - peaks[0] < state

    trained = [nn.Sequential(base.words, *base.layers).requires_grad_(True).train() for base in (shallow, deep)]
    whole = [peak(model, x) for model in trained]
    assert whole[1] - whole[0] > 3 * 4 * state


def test_layers_and_blocks_of_the_user():
    base = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
    module = randomised(LadderSideNetwork(base, D, layers=["1", "3"], block=lambda width: BottleneckAdapter(width, 2)))
    x = torch.randn(B, D, device=DEVICE)
    first = base[:2](x)
    mu = torch.sigmoid(10 * module.alpha)
    h = module.down[0](base[0](x))
    for i, state in enumerate((first, base(x))):
        h = module.blocks[i](mu[i] * h + (1 - mu[i]) * module.down[i + 1](state))
    torch.testing.assert_close(module(x), base(x) + module.up(module.norm(h)))
    assert module.layers == ["1", "3"] and LadderSideNetwork(base, D, layers="").layers == ["0", "1", "2", "3"]
    assert LadderSideNetwork(Trunk(3), D).layers == ["layers.0", "layers.1", "layers.2"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_what_is_read_stays_as_it_was():
    x = torch.randn(B, T, D, device=DEVICE)
    for layers, name in ((["0", "2"], "0"), (["1", "2"], "the first layer's input")):
        base = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D)).to(DEVICE)
        with pytest.raises(RuntimeError, match=f"base must not change in place .*, got a change of that from {name}"):
            LadderSideNetwork(base, D, layers=layers).to(DEVICE)(x)
    module = LadderSideNetwork(base, D, layers=["2"]).to(DEVICE)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), base(x))


def test_threads_run_one_ladder():
    barrier = threading.Barrier(2)
    base = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    module, xs = randomised(LadderSideNetwork(base, D, layers=["0", "2"])), torch.randn(2, B, T, D, device=DEVICE)
    expected = [module(x) for x in xs]

    def meet(*call):
        barrier.wait(30)

    base[1].register_forward_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        assert all(map(torch.equal, threads.map(module, xs), expected))


def test_compilation_keeps_base_whole():
    graphs = []
    module, x = randomised(LadderSideNetwork(Trunk(), D, reduction=4)), ids()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=lambda graph, inputs: graphs.append(graph) or graph)
    torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) == 2


def test_dtypes_and_copies():
    base = Trunk().to(DEVICE, torch.bfloat16)
    module = randomised(LadderSideNetwork(base, D, reduction=4))
    y = module(ids())
    assert y.dtype == torch.bfloat16 and module.up.weight.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
    other, x = copy.deepcopy(module), ids()
    assert torch.equal(other(x), module(x))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def hugging_face(name, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0}
    if name == "Bert":
        sizes = {"vocab_size": WORDS, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 2 * D, **options}
    else:
        sizes |= {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, **options}
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))


def test_models_of_hugging_face():
    x, mask = ids(), torch.ones(B, T, dtype=torch.long, device=DEVICE)
    mask[0, 4:] = 0
    bert = hugging_face("Bert")
    module = randomised(LadderSideNetwork(bert, D, reduction=4))
    out = module(x, mask)
    assert type(out) is type(bert(x)) and list(out) == ["last_hidden_state", "pooler_output"]
    torch.testing.assert_close(out[0], module(input_ids=x, attention_mask=mask, side_mask=mask.bool()).last_hidden_state)
    alone = module(x[:1, :4]).last_hidden_state  # padding is not seen
    torch.testing.assert_close(out.last_hidden_state[:1, :4], alone)
    gpt = randomised(LadderSideNetwork(hugging_face("GPT2"), D, reduction=4, causal=True))
    assert gpt.layers == ["h.0", "h.1"]
    first = gpt(x).last_hidden_state[:, :4]
    torch.testing.assert_close(first, gpt(x[:, :4]).last_hidden_state)
    past = gpt(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must be empty: a side network has no cache"):
        gpt(x[:, -1:], past_key_values=past)
    pair = nn.ModuleDict({"encoder": Trunk(), "decoder": Trunk()})
    with pytest.raises(ValueError, match="layers must be given where .*, got .'encoder.layers', 'decoder.layers'."):
        LadderSideNetwork(pair, D)


def test_a_file_holds_the_side_network_alone(tmp_path):
    pytest.importorskip("safetensors.torch")
    model = nn.Sequential(randomised(LadderSideNetwork(Trunk(), D, reduction=4)))
    names = save_adapters(model, tmp_path / "a")
    assert sorted(names) == sorted(freeze_except(model, "side")) and not any("base" in name for name in names)
    other = nn.Sequential(LadderSideNetwork(model[0].base, D, reduction=4, device=DEVICE))
    load_adapters(other, tmp_path / "a")
    assert torch.equal(other(x := ids()), model(x))
    with pytest.raises(ValueError, match="0 has residual=True in the file, residual=False in the model"):
        load_adapters(nn.Sequential(LadderSideNetwork(model[0].base, D, reduction=4, residual=False)), tmp_path / "a")


class Twice(Trunk):
    def forward(self, ids):
        x = self.words(ids)
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)
        return x


class Logits(Trunk):
    def forward(self, ids):
        return super().forward(ids)[..., :5]


LINEAR = nn.Linear(D, D)
PADDING = torch.tensor([[False, False, True], [False, False, False]])
NESTED = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, D, batch_first=True), 2)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda: SideNetwork(F.relu, LINEAR), TypeError, "base must be a torch.nn.Module, got function"),
        (lambda: SideNetwork(LINEAR, F.relu), TypeError, "side must be a torch.nn.Module, got function"),
        (lambda: SideNetwork(LINEAR, LINEAR, alpha=1.0), ValueError, r"alpha must be a number in \(0, 1\), got 1\.0"),
        (lambda: SideNetwork(LINEAR, LINEAR, alpha=2, learned=False), ValueError, r"alpha must be a number in \[0, 1\], got 2"),
        (
            lambda: SideNetwork(LINEAR, nn.Linear(D, 3))(torch.zeros(2, D)), ValueError,
            r"side must put out \(2, 32\) like base, got \(2, 3\)",
        ),
        (
            lambda: SideNetwork(Trunk(wrap=lambda y: "y"), LINEAR)(ids().cpu()), TypeError,
            "base must return a tensor, or a tuple or a mapping that starts with one, got str",
        ),
        (lambda: LadderSideNetwork(Trunk(), D, reduction=5), ValueError, "reduction must divide d = 32, got 5"),
        (lambda: LadderSideNetwork(Trunk(), D, h=3), ValueError, "h must divide the width 4 of the side network, got 3"),
        (lambda: LadderSideNetwork(Trunk(), D, temperature=0), ValueError, "temperature must be a positive number, got 0"),
        (lambda: LadderSideNetwork(LINEAR, D), ValueError, "layers must be given where base has not one .*, got none"),
        (lambda: LadderSideNetwork(Trunk(), D, layers=[]), ValueError, "layers must name at least one layer of base, got none"),
        (
            lambda: LadderSideNetwork(Trunk(), D, layers=["layer.0"]), ValueError,
            r"layers must name submodules of base, such as \['words', .*, got 'layer.0'",
        ),
        (
            lambda: LadderSideNetwork(Trunk(), D, layers=["layers.1", "layers.0"])(ids().cpu()), RuntimeError,
            r"layers must each run once, in the order \['layers.1', 'layers.0'\], got \['layers.0', 'layers.1'\]",
        ),
        (lambda: LadderSideNetwork(Twice(), D)(ids().cpu()), RuntimeError, "layers must each run once, .*, got .*0'.*1'.*0'"),
        (
            lambda: LadderSideNetwork(Trunk(), 2 * D)(ids().cpu()), ValueError,
            r"layers must put out \(\.\.\., 64\), got \(3, 7, 32\) from the first layer's input",
        ),
        (
            lambda: LadderSideNetwork(Logits(), D)(ids().cpu()), ValueError,
            r"base must put out hidden states \(3, 7, 32\), got \(3, 7, 5\)",
        ),
        (
            lambda: LadderSideNetwork(NESTED, D)(torch.zeros(2, 3, D), src_key_padding_mask=PADDING),
            ValueError, r"layers must put out \(\.\.\., 32\), got a nested tensor",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_a_base_that_is_refused_stays_trainable():
    base = Trunk()
    for wrong in (lambda: LadderSideNetwork(base, D, h=3), lambda: SideNetwork(base, LINEAR, alpha=7)):
        with pytest.raises(ValueError):
            wrong()
    assert base.training and all(p.requires_grad for p in base.parameters())
