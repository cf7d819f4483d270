"""The compiled kernels on every instruction set of this machine, against the references in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.ops import Choice, Matrix, NormLayer, attend_pages, head, linear, project, qkv, sample, up, use, write_pages
from hasten.ops.cpu import native, native_pages, native_sample
from hasten.ops.cpu.build import FLAGS, SOURCES, BuildError, build, compilers, stamp
from hasten.ops.cpu.library import LEVELS, LIBRARY, Library, load
from hasten.spec import Attention, Head, Mlp, Norm
from tests.ops.cases import CASES, convert
from tests.ops.test_cpu import TOLERANCES

ROOT = Path(__file__).parents[2]
OFF = os.environ.get("HASTEN_CPU") == "off"
FOUND = load()
HERE = range(FOUND.level + 1) if isinstance(FOUND, Library) else ()
NEEDED = pytest.mark.skipif(not isinstance(FOUND, Library), reason=f"no kernels of our own: {FOUND}")
EACH_LEVEL = pytest.mark.parametrize("level", [pytest.param(n, id=LEVELS[n]) for n in HERE])
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d)[6:])


def at(level: int) -> Library:
    assert isinstance(FOUND, Library)
    return replace(FOUND, level=level)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: int = 64) -> None:
    """Bounds as in test_cpu, which are for sums of 64 terms."""
    assert got.shape == want.shape
    bound = TOLERANCES[dtype] * max(terms / 64, 1.0) ** 0.5
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=bound)


def wide(*given: object) -> tuple[object, ...]:
    return convert(given, torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def apart(rows: int, columns: int, gap: int, offset: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) whose rows are `gap` numbers apart and begin `offset` numbers behind an aligned address."""
    return random(rows * (columns + gap) + offset, dtype=dtype)[offset:].view(rows, columns + gap)[:, :columns]


# ---- that they are here


def test_kernels_are_in_use_where_a_compiler_is() -> None:
    if OFF or not compilers() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("nothing to compile with, or for")
    assert isinstance(FOUND, Library), f"{FOUND}; an editable install compiles, and so does `python -m hasten.ops.cpu`"


@NEEDED
@EACH_DTYPE
def test_a_row_goes_to_them_first(dtype: torch.dtype) -> None:
    x, m = random(1, 33, dtype=dtype), Matrix(random(8, 33, dtype=dtype))
    n = NormLayer(Norm("rms", 1e-5), random(33, dtype=dtype))
    chosen = [
        linear.explain(x, m),
        qkv.explain(x, n, m, Attention(2, 1, 2, 1.0, True, ""), None, None, None, None),
        up.explain(x, n, m, Mlp(4, "silu", True, False)),
        project.explain(x, m, random(1, 8, dtype=dtype), None, None, 1.0, None),
        head.explain(x, n, m, Head(False)),
    ]
    assert all(("native", "chosen") in rows for rows in chosen)


# ---- products


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
@given(data=st.data())
def test_product_of_any_shape_is_the_reference(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    size = st.integers(1, 150)
    tokens, rows, columns = data.draw(st.integers(0, 9)), data.draw(size), data.draw(size)
    gap, offset = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    x, w = apart(tokens, columns, gap, offset, dtype), apart(rows, columns, offset, gap, dtype)
    m = Matrix(w, random(rows, dtype=dtype) if data.draw(st.booleans()) else None)
    got = native.multiply(at(level), x, m)
    close(got, linear.reference(*wide(x, m)), dtype, columns)
    assert got.dtype == dtype


@NEEDED
@EACH_LEVEL
@pytest.mark.parametrize("act", native.ACTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_up_with_its_norm_is_the_reference(level: int, act: str, gated: bool, kind: str) -> None:
    n = NormLayer(Norm(kind, 1e-5, kind == "layer", offset=1.0), random(45), random(45) if kind == "layer" else None)
    mlp, m = Mlp(300, act, gated, True), Matrix(random(600, 45) / 3, random(600))
    for tokens in (1, 5):
        x = random(tokens, 45) * 2 + 1
        got = native.multiply(at(level), x, m, n, native.ACTS[act], gated)
        if not gated:
            mlp = replace(mlp, width=600)
        with use("reference"):
            close(got, up(*wide(x, n, m, mlp)), torch.float32, 45 * 8)


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
def test_residual_and_scale_come_behind_the_product(level: int, dtype: torch.dtype) -> None:
    for tokens in (1, 3, 6):
        x, m, r = random(tokens, 70, dtype=dtype), Matrix(random(90, 70, dtype=dtype)), random(tokens, 90, dtype=dtype)
        got = native.multiply(at(level), x, m, residual=r, scale=0.5)
        with use("reference"):
            close(got, project(*wide(x, m, r, None, None, 0.5, None)), dtype)


@NEEDED
@EACH_LEVEL
def test_activations_keep_their_digits_and_their_ends(level: int) -> None:
    x = torch.cat((torch.linspace(-60, 60, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])))
    for act, code in native.ACTS.items():
        got = native.multiply(at(level), torch.ones(1, 1), Matrix(x.view(-1, 1)), act=code)[0]
        with use("reference"):
            want = up(torch.ones(1, 1).double(), None, Matrix(x.double().view(-1, 1)), Mlp(len(x), act, False, False))[
                0
            ]
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-12, msg=act)


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
def test_what_is_not_a_number_stays_so_and_rounding_is_to_even(level: int, dtype: torch.dtype) -> None:
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0 + 2**-9, 1.0 + 3 * 2**-9, 65504, 65519, 65520]
    )
    many = torch.cat((special, torch.randn(400) * 2.0 ** torch.randint(-26, 15, (400,))))
    one = torch.ones(1, 1, dtype=dtype)
    stored = Matrix(many.to(dtype).view(-1, 1))  # every number that is loaded comes out as it was
    torch.testing.assert_close(
        native.multiply(at(level), one, stored)[0], stored.weight[:, 0], rtol=0, atol=0, equal_nan=True
    )
    halves = Matrix(many.to(dtype).view(-1, 1), (many / 3).to(dtype))  # every sum is rounded once, as torch rounds
    want = (halves.weight[:, 0].float() + halves.bias.float()).to(dtype)
    torch.testing.assert_close(native.multiply(at(level), one, halves)[0], want, rtol=0, atol=0, equal_nan=True)


@NEEDED
def test_the_number_of_threads_changes_no_bit() -> None:
    x, m = random(3, 768), Matrix(random(1000, 768), random(1000))
    alone = native.multiply(at(HERE[-1]), x, m)
    try:
        torch.set_num_threads(3)
        assert native.multiply(at(HERE[-1]), x, m).equal(alone)
    finally:
        torch.set_num_threads(1)


@NEEDED
def test_what_they_do_not_take_is_right_all_the_same() -> None:
    x = random(1, 24)
    for m in (
        Matrix(random(24, 16).T),  # columns first
        Matrix(random(16, 48)[:, ::2]),
        Matrix(random(16, 24).double()),
        Matrix(random(16, 24), random(32)[::2]),
    ):
        assert not native.few(x, m)
        close(linear(x, m), linear.reference(*wide(x, m)), torch.float32)
    assert not native.few(random(0, 24), Matrix(random(16, 24)))
    for mine, w in ((x, random(16, 24).requires_grad_()), (x.clone().requires_grad_(), random(16, 24))):
        assert not native.few(mine, Matrix(w))
        with torch.no_grad():
            assert native.few(mine, Matrix(w))


@NEEDED
def test_callers_in_several_threads_and_a_forked_child_get_their_own_answers() -> None:
    code = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from hasten.ops import Matrix
from hasten.ops.cpu import native
from hasten.ops.cpu.library import load
torch.set_num_threads(3)
work = [(torch.randn(1, 700), Matrix(torch.randn(900, 700))) for _ in range(8)]
torch.set_num_threads(1)
want = [native.multiply(load(), *w) for w in work]
native.THREADS = 3
def check(i):
    return all(native.multiply(load(), *work[i]).equal(want[i]) for _ in range(200))
with ThreadPoolExecutor(8) as many:
    assert all(many.map(check, range(8)))
if (child := os.fork()) == 0:
    signal.alarm(60)
    os._exit(not check(0))
print(os.waitpid(child, 0)[1])
"""
    assert fresh(code) == "0\n"


# ---- pages


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
@pytest.mark.parametrize("case", CASES["attend_pages"])
def test_attention_over_pages_is_the_reference(level: int, dtype: torch.dtype, case: str) -> None:
    arguments = CASES["attend_pages"][case](dtype)
    got = native_pages.attend_steps(at(level), *arguments)
    with use("reference"):
        close(got, attend_pages(*wide(*arguments)), dtype)


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
@given(data=st.data())
def test_steps_of_any_size_are_the_reference(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    kv_heads, group, dim = (data.draw(st.integers(1, n)) for n in (3, 10, 70))
    size, lengths = data.draw(st.integers(1, 40)), data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    window, cap = data.draw(st.none() | st.integers(1, 200)), data.draw(st.none() | st.floats(1.0, 30.0))
    most, heads = max(-(-n // size) for n in lengths) + 1, kv_heads * group
    tables = torch.randperm(most * len(lengths)).view(len(lengths), most)
    pools = [random(most * len(lengths), size, kv_heads, dim, dtype=dtype) for _ in range(2)]
    q = random(len(lengths), heads + 1, dim, dtype=dtype)[:, 1:]
    a = Attention(heads, kv_heads, dim, dim**-0.5, True, "", window=window, softcap=cap)
    slopes = torch.rand(heads) if data.draw(st.booleans()) else None
    sinks = random(heads, dtype=dtype) if data.draw(st.booleans()) else None
    arguments = q, *pools, tables, None, torch.tensor(lengths), a, slopes, sinks
    with use("reference"):
        want = attend_pages(*wide(*arguments))
    close(native_pages.attend_steps(at(level), *arguments), want, dtype)


@NEEDED
@EACH_DTYPE
@pytest.mark.parametrize("gap", [False, True])
def test_rows_are_written_where_they_belong_and_nowhere_else(dtype: torch.dtype, gap: bool) -> None:
    slots = torch.tensor([5, -1, 0, 19])
    fused = random(4, 9, 10, dtype=dtype)
    k, v = (fused[:, 3:6], fused[:, 6:]) if gap else (random(4, 3, 10, dtype=dtype), random(4, 3, 10, dtype=dtype))
    pools = [random(5, 4, 3, 10, dtype=dtype) for _ in range(2)]
    want = [pool.clone() for pool in pools]
    write_pages.reference(k, v, *want, slots)
    native_pages.write_rows(at(0), k, v, *pools, slots)
    assert all(pool.equal(w) for pool, w in zip(pools, want, strict=True))


# ---- choices


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
@given(data=st.data())
def test_the_likeliest_is_the_first_of_the_greatest(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, columns, gap = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 100)), data.draw(st.integers(0, 3))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -2.5, 7.0, -torch.inf])
    special = st.lists(st.tuples(st.integers(0, columns - 1), st.sampled_from([torch.inf, torch.nan, 7.0])), max_size=2)
    x = torch.tensor([[data.draw(numbers) for _ in range(columns)] for _ in range(rows)])
    for at_column, value in data.draw(special):
        x[-1, at_column] = value
    logits = torch.cat((x, x.new_full((rows, gap), torch.nan)), 1).to(dtype)[:, :columns]
    got = native_sample.choose(at(level), logits)
    assert got.tolist() == sample.reference(logits, Choice(), None, None, None).tolist()


@NEEDED
def test_greedy_rows_go_to_the_library_and_no_others() -> None:
    x, none = random(2, 50), (None, None, None)

    def chosen(x: Tensor, c: Choice) -> str:
        return dict(sample.explain(x, c, *none))["native"]

    assert chosen(x, Choice()) == chosen(x.bfloat16(), Choice(top_k=torch.tensor([3, 3]))) == "chosen"
    no = "does not accept these arguments"
    assert chosen(x, Choice(temperature=torch.ones(2))) == chosen(x, Choice(presence=torch.ones(2))) == no
    assert chosen(x.double(), Choice()) == chosen(x[:, ::2], Choice()) == chosen(x[:0], Choice()) == no
    assert chosen(torch.zeros(1, 1).expand(2**11, 2**10), Choice()) == no


# ---- compiling and loading


def test_without_a_compiler_there_is_one_clear_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found"):
        build(tmp_path / "kernels.so")
    monkeypatch.setenv("CC", "/nowhere/cc -pipe")
    with pytest.raises(BuildError, match="/nowhere/cc"):
        build(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []


def fresh(code: str, **environment: str) -> str:
    """What `code` prints in an interpreter of its own."""
    told = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=told, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@NEEDED
@pytest.mark.parametrize("told", ["off", "portable", "sse9"])
def test_the_environment_chooses(told: str) -> None:
    code = """
import torch
from hasten.ops import Matrix, linear
from hasten.ops.cpu.library import load
print(dict(linear.explain(torch.ones(1, 8), Matrix(torch.ones(3, 8)))).get("native"), getattr(load(), "level", load()))
"""
    want = {"off": "None HASTEN_CPU=off\n", "portable": "chosen 0\n"}
    last = "None HASTEN_CPU=sse9: there are portable, avx2, avx512 and off\n"
    assert fresh(code, HASTEN_CPU=told) == want.get(told, last)


@NEEDED
def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    other = tmp_path / "kernels.so"
    assert "not compiled" in str(load(other))
    load.cache_clear()
    other.write_bytes(LIBRARY.read_bytes().replace(stamp().encode(), b"0" * 16))
    assert "compiled from other sources" in str(load(other))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing that can be loaded")
    assert "cannot be loaded" in str(load(broken))
    load.cache_clear()


@pytest.mark.skipif(not compilers(), reason="no compiler")
def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    command = [
        *compilers()[0],
        *FLAGS,
        "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(SOURCES[0]),
        "-o",
        str(tmp_path / "k.so"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


EXERCISE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from hasten.model import native_stack
from hasten.ops import Matrix, NormLayer
from hasten.ops.cpu import native, native_pages, native_sample
from hasten.ops.cpu.library import Library, load
from tests.ops.stack_cases import STACKS
from hasten.spec import Attention, Norm
torch.set_num_threads(1)
found = load(Path(sys.argv[1]))
assert isinstance(found, Library), found
for level in range(found.level + 1):
    lib = replace(found, level=level)
    for dtype in native.NUMBERS:
        def random(*shape):
            return torch.randn(shape).to(dtype)
        shapes = (1, 1, 1), (1, 7, 33), (2, 5, 16), (3, 301, 15), (4, 8, 65), (9, 1026, 3), (0, 4, 4)
        for tokens, rows, columns in shapes:
            n = NormLayer(Norm("layer", 1e-5, True), random(columns), random(columns))
            m, half = Matrix(random(rows, columns), random(rows)), Matrix(random(2 * rows, columns))
            for act in native.ACTS.values():
                native.multiply(lib, random(tokens, columns), m, n, act)
            native.multiply(lib, random(tokens, columns), half, None, 6, True)
            native.multiply(lib, random(tokens, columns), m, residual=random(tokens, rows), scale=0.5)
        for dim, heads, kv in ((1, 1, 1), (10, 9, 1), (64, 4, 2), (250, 2, 2)):
            for length in (1, 64, 65, 130):
                pools = random(40, 4, kv, dim), random(40, 4, kv, dim)
                a = Attention(heads, kv, dim, 0.1, True, "", window=100, softcap=3.0)
                table, count = torch.arange(40).view(1, 40), torch.tensor([length])
                slopes, sinks = torch.rand(heads), random(heads)
                native_pages.attend_steps(lib, random(1, heads, dim), *pools, table, None, count, a, slopes, sinks)
                native_pages.write_rows(lib, random(2, kv, dim), random(2, kv, dim), *pools, torch.tensor([-1, 159]))
        for make in STACKS.values():
            if native_stack.steps(*(arguments := make(dtype))):
                native_stack.run(lib, *arguments)
        for columns in (1, 15, 16, 100):
            native_sample.choose(lib, random(2, columns))
print("clean")
"""

SHORT = "native_stack.run(lib, *arguments[:2], replace(arguments[2], where=arguments[2].where[1:].clone()))"


@pytest.mark.skipif(not compilers() or sys.platform != "linux", reason="no compiler with sanitizers")
def test_sanitizers_find_nothing_unless_there_is_something(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    try:
        build(library, ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
    except BuildError as e:
        pytest.skip(f"the compiler has no sanitizers: {str(e)[:200]}")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run(
            [*compilers()[0], f"-print-file-name={name}"], check=True, capture_output=True, text=True
        )
        runtimes.append(asked.stdout.strip())
    if not all(Path(path).is_file() for path in runtimes):
        pytest.skip("the sanitizers' runtimes are not where the compiler says")
    told = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "HASTEN_CPU": "",
        "PYTHONPATH": str(ROOT),
    }

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(library)]
        return subprocess.run(command, env={**os.environ, **told}, check=False, capture_output=True, text=True)

    done = run(EXERCISE)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-3000:]
    early = EXERCISE.replace(
        "Matrix(random(rows, columns), random(rows))", "Matrix(random(rows, columns), random(rows - 1))"
    )
    assert "heap-buffer-overflow" in run(early).stderr
    short = EXERCISE.replace("native_stack.run(lib, *arguments)", SHORT)
    assert "heap-buffer-overflow" in run(short).stderr
