"""The bank of LoRA adapters: each row is what its own adapter makes of it, and slots change while it serves."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fastadapt.nn import AdapterBank, LoRABank, LoRALinear, freeze_except

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .test_lora_linear import Quantised
from .test_nn_bank import IDS, rows_of
from .test_nn_lora import K, N, conv1d, randomised, saved

G, R = 4, 7
ADAPTERS = ({"r": 3, "alpha": 5}, {"r": 7, "alpha": 16, "rslora": True}, {"r": 1, "alpha": -2})


def bank_of(base, lora_bias=False, **options):
    """Three adapters of their own ranks, one of which moves to the last slot, and the bank that holds them."""
    singles = [randomised(LoRALinear(copy.deepcopy(base), lora_bias=lora_bias, **adapter)) for adapter in ADAPTERS]
    bank = LoRABank(base, G, R, lora_bias=lora_bias, **options).to(DEVICE)
    for slot, single in enumerate(singles):
        assert bank.add(single) == slot
    bank.remove(2)
    bank.replace(3, singles[2])
    assert bank.slots == [0, 1, 3]
    return bank, {0: singles[0], 1: singles[1], 3: singles[2]}


def results(call, parameters, x, grad_y):
    """Output and gradients by name. What a call has no part of gets zeros."""
    x = x.clone().requires_grad_()
    y = call(x)
    grads = torch.autograd.grad(y, [x, *parameters.values()], grad_y.to(y.dtype), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip([x, *parameters.values()], grads)]
    return dict(zip(["y", "x", *parameters], [y.detach(), *grads]))


def one_by_one(base, singles, ids):
    def call(x):
        y, rows = base(x), rows_of(ids, x.shape)
        for slot, single in singles.items():
            at = (rows == slot).nonzero(as_tuple=True)
            y = y.index_put(at, single(x[at]))
        return y

    return call


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_base, lora_bias", [(lambda: nn.Linear(K, N), False), (conv1d, True)], ids=["linear", "conv1d"])
def test_equals_its_adapters(make_base, lora_bias, dtype, ids):
    """Output and gradients; slot 2 is free, slot 3 gets no row, and rows of -1 get what the base computes."""
    ids = torch.where(ids == 0, 2, ids).to(DEVICE)
    bank, singles = bank_of(make_base().to(DEVICE, dtype), lora_bias)
    assert bank.lora_A.dtype == torch.float32 and not bank.base.weight.requires_grad
    double = {slot: copy.deepcopy(single).double() for slot, single in singles.items()}
    for slot, single in double.items():
        single.scale = bank.scale[slot].item()
    x, grad_y = torch.randn(4, 3, K, device=DEVICE).to(dtype), torch.randn(4, 3, N, device=DEVICE).to(dtype)
    parameters = {f"{slot}.{name}": p for slot, single in double.items() for name, p in trained(single).items()}
    call = one_by_one(copy.deepcopy(bank.base).double(), double, ids)
    oracle = results(call, parameters, x.double(), grad_y.double())
    plain_bank = copy.deepcopy(bank)
    plain_bank.backend = "reference"
    expected, actual = (results(lambda x: b(x, ids), trained(b), x, grad_y) for b in (plain_bank, bank))  # noqa: B023
    for name, slices in (("lora_A", lambda t, r: t[:r]), ("lora_B", lambda t, r: t[:, :r]), ("lora_bias", lambda t, r: t)):
        if name not in actual:
            continue
        single_name = "lora_B.bias" if name == "lora_bias" else f"{name}.weight"
        for slot, single in singles.items():
            mine, plain = (slices(t[name][slot], single.r) for t in (actual, expected))
            assert_within_reference_error(mine, plain, oracle[f"{slot}.{single_name}"], f"{name} of {slot}")
            kept = torch.zeros_like(actual[name][slot])
            slices(kept, single.r).fill_(1)
            assert not (actual[name][slot] * (1 - kept)).any(), "ranks beyond the adapter's get no gradient"
    for name in ("y", "x"):
        assert_within_reference_error(actual[name], expected[name], oracle[name], name)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_adapters_go_in_and_out(lora_bias):
    bank, singles = bank_of(nn.Linear(K, N).to(DEVICE), lora_bias)
    before = copy.deepcopy(bank.state_dict())
    tensors = {name: t.data_ptr() for name, t in bank.state_dict().items()}
    x = torch.randn(6, K, device=DEVICE)
    for slot, single in singles.items():
        out = bank.adapter(slot)
        assert (out.r, out.base) == (single.r, bank.base) and out.scale == pytest.approx(single.scale, rel=1e-7)
        mine, theirs = trained(out), trained(single)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        torch.testing.assert_close(out(x), bank(x, torch.full((6,), slot, device=DEVICE)))
        mine["lora_A.weight"].data.zero_()  # a copy, not a view
    bank.remove(0)
    free, without = (bank(x, torch.full((6,), slot, device=DEVICE)) for slot in (0, -1))
    assert torch.equal(free, without) and bank.slots == [1, 3]
    torch.testing.assert_close(free, bank.base(x))  # whose sums may be of another order
    assert bank.add(singles[0]) == 0 and bank.add(singles[1]) == 2 and bank.slots == [0, 1, 2, 3]
    bank.remove(2)
    now = bank.state_dict()
    assert all(torch.equal(t, now[name]) and tensors[name] == now[name].data_ptr() for name, t in before.items())


def test_a_full_bank_and_strangers_are_refused():
    bank, singles = bank_of(nn.Linear(K, N))
    before = copy.deepcopy(bank.state_dict())
    single = singles[0]
    for adapter, error, message in (
        (nn.Linear(K, N), TypeError, "adapter must be a LoRALinear, got Linear"),
        (LoRALinear(nn.Linear(K + 1, N), 2), ValueError, rf"an \({N}, {K}\) weight like that of the bank, .* {K + 1}\)"),
        (LoRALinear(nn.Linear(K, N), R + 1), ValueError, f"adapter must have a rank of at most {R}, the bank's, got {R + 1}"),
        (LoRALinear(nn.Linear(K, N), 2, dora=True), ValueError, "adapter must have dora=False in a bank, got True"),
        (LoRALinear(nn.Linear(K, N), 2, lora_bias=True), ValueError, "lora_bias=False like the bank, got True"),
    ):
        for put in (bank.add, lambda a: bank.replace(1, a)):
            with pytest.raises(error, match=message):
                put(adapter)
    for slot, error, message in (
        (2, ValueError, r"slot must be one of \[0, 1, 3\], which hold an adapter, got 2"),
        (G, IndexError, rf"slot must lie in \[0, {G - 1}\] for a bank of {G}, got {G}"),
        (-1, IndexError, "slot must lie in"),
        (True, TypeError, "slot must be an integer, got bool"),
    ):
        for call in (bank.adapter, bank.remove, *([] if slot == 2 else [lambda s: bank.replace(s, single)])):
            with pytest.raises(error, match=message):
                call(slot)
    assert all(torch.equal(t, before[name]) for name, t in bank.state_dict().items())
    bank.add(single)
    with pytest.raises(RuntimeError, match=f"all {G} slots are in use"):
        bank.add(single)
    with pytest.raises(ValueError, match="g must be"):
        LoRABank(nn.Linear(K, N), 0)
    with pytest.raises(TypeError, match="base must be a torch.nn.Linear"):
        LoRABank(nn.LayerNorm(K), 2)
    x, bank.check_ids = torch.randn(2, K, device=DEVICE), True
    with pytest.raises(ValueError, match="adapter_ids must be"):
        bank(x, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=rf"adapter_ids must lie in \[-1, {G - 1}\] for a bank of {G}, got {G}"):
        bank(x, torch.tensor([0, G], device=DEVICE))


def test_state_dict_says_which_slots_are_in_use():
    bank, singles = bank_of(nn.Linear(K, N), lora_bias=True)
    other = LoRABank(copy.deepcopy(bank.base), G, R, lora_bias=True)
    state = saved(bank)
    assert set(state) == {"base.weight", "base.bias", "lora_A", "lora_B", "lora_bias", "scale", "ranks"}
    other.load_state_dict(state)
    x, ids = torch.randn(5, K, device=DEVICE), torch.tensor([0, 1, 2, 3, -1], device=DEVICE)
    assert torch.equal(other(x, ids), bank(x, ids))
    assert other.slots == [0, 1, 3] and other.add(singles[0]) == 2 and other.adapter(3).r == singles[3].r


def test_changes_compile_nothing_anew():
    bank, singles = bank_of(nn.Linear(K, N).to(DEVICE))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bank, fullgraph=True, backend=counter)
    x = torch.randn(6, K, device=DEVICE)
    for change, ids in (
        (lambda: None, [0, 1, 2, 3, -1, 0]),
        (lambda: bank.remove(0), [0, 1, 2, 3, -1, 0]),
        (lambda: bank.replace(1, singles[3]), [1, 1, 1, -1, -1, -1]),
        (lambda: bank.add(singles[1]), [0, 0, 0, 3, 3, 3]),
    ):
        change()
        ids = torch.tensor(ids, device=DEVICE)
        assert torch.equal(compiled(x, ids), bank(x, ids))
    assert counter.frame_count == 1


def test_learns_in_its_slots_alone():
    """And freeze_except leaves the bank trainable, but not its base."""
    model = nn.ModuleDict({"bank": bank_of(nn.Linear(K, N))[0], "head": nn.Linear(N, 2), "other": AdapterBank(2, N, 3)})
    assert set(freeze_except(model, "lora")) == {"bank.lora_A", "bank.lora_B"}
    bank = model["bank"]
    before = copy.deepcopy(bank)
    optimizer = torch.optim.SGD([bank.lora_A, bank.lora_B], 0.1)
    for _ in range(2):
        bank(torch.randn(6, K, device=DEVICE), torch.tensor([0, 0, 2, 3, -1, 3], device=DEVICE)).square().sum().backward()
        optimizer.step()
    assert bank.slots == [0, 1, 3] and not bank.lora_A[2].any() and not bank.lora_B[2].any()
    assert torch.equal(bank.lora_A[1], before.lora_A[1]) and torch.equal(bank.lora_B[1], before.lora_B[1])
    for slot, r in ((0, 3), (3, 1)):
        assert not bank.lora_A[slot, r:].any() and not bank.lora_B[slot, :, r:].any()
        assert (bank.lora_A[slot, :r] != before.lora_A[slot, :r]).any(1).all()


def test_a_smaller_rank_after_a_larger_one_in_training():
    """The moments of the optimizer would move the ranks that are filled up."""
    bank, singles = bank_of(nn.Linear(K, N).to(DEVICE))
    small, _, large = sorted(singles.values(), key=lambda single: single.r)
    optimizer = torch.optim.AdamW([bank.lora_A, bank.lora_B], 0.1)
    x, ids = torch.randn(6, K, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)

    def step(single):
        bank.replace(0, single)
        optimizer.zero_grad()
        bank(x, ids).square().sum().backward()
        optimizer.step()
        return bank.lora_A[0, single.r :].any() or bank.lora_B[0, :, single.r :].any()

    assert not step(large) and step(small)
    step(large)
    for state in optimizer.state.values():
        state["exp_avg"][0], state["exp_avg_sq"][0] = 0, 0
    assert not step(small)
    torch.testing.assert_close(bank.adapter(0)(x), bank(x, ids))


def test_dropout_is_for_training():
    bank, _ = bank_of(nn.Linear(K, N).to(DEVICE), dropout=0.5)
    x, ids = torch.randn(6, K, device=DEVICE), torch.tensor([0, 1, 2, 3, -1, 1], device=DEVICE)
    runs = [bank(x, ids) for _ in range(2)]
    assert (runs[0] != runs[1]).any(1).tolist() == [True, True, False, True, False, True]
    bank.eval()
    assert torch.equal(bank(x, ids), bank(x, ids)) and not bank.adapter(1).training


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, lambda m: m.to(DEVICE, torch.float16), nn.Module.double])
def test_casts_leave_the_scales_alone(cast):
    bank, singles = bank_of(nn.Linear(K, N))
    scale = bank.scale.clone()
    bank = cast(bank)
    x, ids = torch.randn(3, K, device=DEVICE).to(bank.lora_A.dtype), torch.tensor([0, 1, -1], device=DEVICE)
    assert torch.equal(bank.scale.cpu(), scale.cpu()) and bank.scale.dtype == torch.float32
    assert bank(x, ids).dtype == bank.lora_A.dtype


def test_a_quantised_base():
    bank, _ = bank_of(nn.Linear(K, N).to(DEVICE))
    x, ids = torch.randn(4, K, device=DEVICE), torch.tensor([0, 1, -1, 3], device=DEVICE)
    codes = Quantised(bank.base.weight.detach())
    bank.base.weight = nn.Parameter(codes.dequantize(), requires_grad=False)
    expected = bank(x, ids)
    bank.base.weight = codes
    assert torch.equal(bank(x, ids), expected)
