"""The tile products of csrc/cpu/amx.h by themselves, through a small C interface compiled here."""

import ctypes
import itertools
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
HEADER = HERE.parent / "csrc" / "cpu" / "amx.h"
BF16 = torch.bfloat16
POINTERS = ("col_mul", "col_add", "residual", "col_skip", "skip", "row_mul", "row_add", "row_skip", "normed")


class Epilogue(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]


@pytest.fixture(scope="module")
def compiler():
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return name
    pytest.skip("no C++ compiler")


@pytest.fixture(scope="module")
def lib(compiler, tmp_path_factory):
    out = tmp_path_factory.mktemp("amx") / "driver.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    done = subprocess.run([compiler, *flags, str(HERE / "amx_driver.cpp"), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lib = ctypes.CDLL(str(out))
    lib.amx_available.restype = ctypes.c_bool
    lib.guarded.restype = ctypes.c_void_p
    if not lib.amx_available():
        pytest.skip("this processor or system has no AMX bfloat16 tiles")
    return lib


def integers(*shape, low=-4, high=5, dtype=BF16):
    """Small integers: every sum is exact in float32, so that a result is right or wrong, not near."""
    return torch.randint(low, high, shape).to(dtype)


def guarded(lib, t, at_end=True):
    """A copy of a contiguous tensor whose last (or first) element touches a page that faults."""
    nbytes = max(t.numel() * t.element_size(), 1)
    address = lib.guarded(ctypes.c_int64(nbytes), ctypes.c_bool(at_end))
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    out = torch.frombuffer(memory, dtype=t.dtype, count=t.numel()).view(t.shape)
    return out.copy_(t)


def rows(t):
    """The addresses of the rows of a matrix, as the kernels take them."""
    assert t.stride(1) == 1 or t.shape[1] == 1
    return (ctypes.c_void_p * len(t))(*(t.data_ptr() + i * t.stride(0) * t.element_size() for i in range(len(t))))


def int64(*values):
    return [ctypes.c_int64(v) for v in values]


def address(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def down(lib, x, w, scale=None, start=None):
    """start + x @ w.T, the entries of w times scale along the inner dimension."""
    m, k, n = len(x), *w.T.shape
    ldz = (n + 15) // 16 * 16
    z = torch.full(((m + 15) // 16 * 16, ldz), torch.nan)
    lib.amx_down(
        rows(x), *int64(m, k), address(w), ctypes.c_bool(w.dtype == torch.float32), *int64(*w.stride()), address(scale),
        *int64(n), address(start), address(z), *int64(ldz),
    )  # fmt: skip
    return z[:m, :n]


def up(lib, h, w, y, **pointers):
    """y = epilogue(h @ w.T), h rounded to bfloat16."""
    keep = {name: rows(t) if t.dtype == BF16 else t for name, t in pointers.items()}
    epilogue = Epilogue(**{
        name: ctypes.addressof(v) if isinstance(v, ctypes.Array) else v.data_ptr() for name, v in keep.items()
    })  # fmt: skip
    lib.amx_up(
        address(h), *int64(len(h), h.shape[1]), address(w), ctypes.c_bool(w.dtype == torch.float32), *int64(*w.stride()),
        *int64(len(w)), ctypes.byref(epilogue), rows(y),
    )  # fmt: skip
    return y


def accumulate(lib, h, x, c, ones=False, fresh=False):
    lib.amx_accumulate(
        address(h), *int64(*h.shape), ctypes.c_bool(ones), rows(x), *int64(x.shape[1]), ctypes.c_bool(fresh), address(c),
    )  # fmt: skip
    return c


SIZES = [(1, 1, 1), (2, 31, 8), (15, 32, 16), (16, 33, 17), (17, 64, 32), (31, 97, 33), (32, 128, 48), (33, 2, 64), (63, 9, 65)]


@pytest.mark.parametrize("m,k,n", SIZES)
def test_down_is_exact_on_integers(lib, m, k, n):
    x, w = integers(m, k), integers(n, k)
    expected = (x.double() @ w.double().T).float()
    for at_end in (True, False):
        assert torch.equal(down(lib, guarded(lib, x, at_end), guarded(lib, w, at_end)), expected)
    for weight in (w.float(), w.T.contiguous().T, w.float().T.contiguous().T, integers(n, 2 * k)[:, ::2].copy_(w)):
        assert torch.equal(down(lib, x, weight), expected)
    scale = integers(k, low=1, dtype=torch.float32)
    for weight in (w, w.T.contiguous().T, w.float(), w.float().T.contiguous().T, integers(n, 2 * k)[:, ::2].copy_(w)):
        assert torch.equal(down(lib, x, weight, guarded(lib, scale)), (x.double() * scale @ w.double().T).float())
    start = torch.zeros((n + 15) // 16 * 16)
    start[:n] = integers(n)
    assert torch.equal(down(lib, x, w, start=start), expected + start[:n])


def test_down_takes_rows_from_anywhere(lib):
    pool, w = integers(70, 100), integers(20, 100)
    for pick in (torch.randperm(70)[:37], torch.arange(69, -1, -2), torch.zeros(40, dtype=torch.long)):
        scattered = [guarded(lib, pool[i]) for i in pick]
        z = torch.full((48, 32), torch.nan)
        pointers = (ctypes.c_void_p * len(pick))(*(t.data_ptr() for t in scattered))
        lib.amx_down(
            pointers, *int64(len(pick), 100), address(w), ctypes.c_bool(False), *int64(100, 1), None, *int64(20), None,
            address(z), *int64(32),
        )  # fmt: skip
        assert torch.equal(z[: len(pick), :20], (pool[pick].double() @ w.double().T).float())
    assert torch.equal(down(lib, pool[:1].expand(33, 100), w), (pool[:1].double() @ w.double().T).float().expand(33, 20))


@pytest.mark.parametrize("m,k,n", SIZES)
def test_up_is_exact_on_integers(lib, m, k, n):
    k = min(k, 65)
    h, w = integers(m, k, low=-1, high=2, dtype=torch.float32), integers(n, k, low=-1, high=2)
    x, residual, normed = integers(m, n), integers(m, n), integers(m, n)
    columns = {name: integers(n, dtype=torch.float32) for name in ("col_mul", "col_add", "col_skip")}
    lines = {name: integers(m, dtype=torch.float32) for name in ("row_mul", "row_add", "row_skip")}
    product = h.double() @ w.double().T
    for weight, scaled, added, skips, norm in itertools.product((w, w.float().T.contiguous().T), *[(False, True)] * 4):
        given, expected = {}, product
        if norm:
            given |= lines | {"normed": guarded(lib, normed)}
            expected = expected * lines["row_mul"][:, None]
        if scaled:
            given |= {name: guarded(lib, columns[name]) for name in ("col_mul", "col_add")}
            expected = expected * columns["col_mul"] + columns["col_add"]
        if norm:
            expected = expected + lines["row_add"][:, None] + lines["row_skip"][:, None] * normed
        if added:
            given["residual"] = guarded(lib, residual)
            expected = expected + residual
        if skips:
            given |= {"col_skip": guarded(lib, columns["col_skip"]), "skip": guarded(lib, x)}
            expected = expected + columns["col_skip"] * x
        y = guarded(lib, torch.full((m, n), torch.nan, dtype=BF16))
        assert torch.equal(up(lib, h, weight, y, **given), expected.float().to(BF16))


def test_up_writes_its_rows_alone(lib):
    h, w = integers(20, 24, dtype=torch.float32), integers(45, 24)
    wide = torch.full((20, 80), 7.0, dtype=BF16)
    up(lib, h, w, wide[:, 3:48])
    assert torch.equal(wide[:, 3:48], (h.double() @ w.double().T).float().to(BF16))
    assert bool((wide[:, :3] == 7).all() and (wide[:, 48:] == 7).all())


@pytest.mark.parametrize("m,n,r", SIZES)
def test_accumulate_is_exact_on_integers(lib, m, n, r):
    h, x = integers(m, r, dtype=torch.float32), integers(m, n)
    for ones in (False, True):
        start = integers(r + ones, n, dtype=torch.float32)
        left = torch.cat([h, h.new_ones(m, ones)], 1)
        c = accumulate(lib, h, guarded(lib, x), start.clone(), ones)
        assert torch.equal(c, (left.double().T @ x.double() + start).float())
        accumulate(lib, h, x, c, ones)
        assert torch.equal(c, (2 * left.double().T @ x.double() + start).float())
        c = accumulate(lib, h, x, torch.full_like(start, torch.nan), ones, fresh=True)
        assert torch.equal(c, (left.double().T @ x.double()).float())


def test_random_values_stay_within_float32_accumulation(lib):
    """The bound of a float32 sum in any order, k * 2**-24 * sum |x w|; y adds half a unit of bfloat16."""
    x, w, v = torch.randn(40, 500).to(BF16), torch.randn(48, 500), torch.randn(300, 48).to(BF16)
    z, bound = down(lib, x, w), 500 * 2**-24 * (x.double().abs() @ w.to(BF16).double().abs().T)
    exact = x.double() @ w.to(BF16).double().T
    assert bool(((z.double() - exact).abs() <= bound).all())
    z = z.contiguous()
    y = up(lib, z, v, torch.empty(40, 300, dtype=BF16))
    a = z.to(BF16).double()
    exact, bound = a @ v.double().T, 48 * 2**-24 * (a.abs() @ v.double().abs().T)
    assert bool(((y.double() - exact).abs() <= bound + 2**-8 * (exact.abs() + bound)).all())
    c = accumulate(lib, z, x, torch.zeros(48, 500))
    exact, bound = a.T @ x.double(), 41 * 2**-24 * (a.T.abs() @ x.double().abs())
    assert bool(((c.double() - exact).abs() <= bound).all())


def test_nan_and_inf_stay_in_their_row(lib):
    x, w = torch.randn(35, 64).to(BF16), torch.randn(24, 64).to(BF16)
    clean = down(lib, x, w)
    x[3, 5], x[34, 63] = torch.nan, torch.inf
    z = down(lib, x, w)
    others = [i for i in range(35) if i not in (3, 34)]
    assert bool(z[3].isnan().all()) and bool(z[34].isinf().all()) and torch.equal(z[others], clean[others])
    h = torch.randn(35, 24)
    h[17, 2] = torch.nan
    y = up(lib, h, w.T.contiguous(), torch.empty(35, 64, dtype=BF16))
    assert bool(y[17].isnan().all()) and not bool(y[[i for i in range(35) if i != 17]].isnan().any())


def test_padding_adds_nothing_to_an_infinite_sum(lib):
    x = torch.ones(35, 40, dtype=BF16)
    x[34, 3] = torch.inf
    c = accumulate(lib, torch.ones(35, 5), x, torch.zeros(5, 40))
    assert bool((c[:, 3] == torch.inf).all()) and bool((c[:, 4] == 35).all())


def test_a_row_does_not_depend_on_its_block(lib):
    x, w = torch.randn(64, 100).to(BF16), torch.randn(20, 100).to(BF16)
    z = down(lib, x, w)
    for i in range(0, 64, 7):
        assert torch.equal(down(lib, x[i : i + 1], w)[0], z[i])


def test_threads_and_other_users_of_the_tiles(lib):
    """Scopes on several threads, between bfloat16 products of PyTorch, which configures the tiles in its own way."""
    x, w = integers(40, 64), integers(20, 64)
    expected, failures = (x.double() @ w.double().T).float(), []

    def work():
        for _ in range(50):
            if not torch.equal(down(lib, x, w), expected) or not torch.equal((x @ w.T).float(), expected.to(BF16).float()):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_header_without_amx(compiler, tmp_path):
    """Where the target has no AMX the header compiles, and says so."""
    source = tmp_path / "without.cpp"
    source.write_text(f'#include "{HEADER}"\nint main() {{ return fastadapt::amx::available() + FASTADAPT_AMX; }}\n')
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-U__linux__"]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "without")], check=True)
    assert subprocess.run([str(tmp_path / "without")]).returncode == 0
