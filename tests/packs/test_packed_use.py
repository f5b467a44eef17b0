"""What a pack has not, how it is said, and how packed attentions travel: copies, pickles, traced calls."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.packs import driver, load
from tests.packs.interpreted import Interpreted, interpreted_packs, pack_of

doc, slope = ag.Tensor("doc", 2, dtype=torch.int32), ag.Tensor("slope", 1)
SPEC = ag.Spec(
    mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j), score=lambda s, b, h, i, j: s + slope[h] * (j - i)
)
N = 40


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreted_packs() as found:
        yield found


@pytest.fixture(scope="module")
def folder(interpreted: Interpreted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("use") / "pack"
    pack_of(path, SPEC, ["B1 Hq2 Hkv1 N64 D16"])
    return path


@pytest.fixture
def attend(folder: Path) -> Any:
    return ag.load(folder)["it"]


def rows(dim: int = 16, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, N, dim, dtype=dtype, requires_grad=grad) for heads in (2, 1, 1))


def captures(**changes: Any) -> dict[str, Any]:
    return {"doc": (torch.arange(N) // 25).int()[None], "slope": torch.tensor([0.5, 0.25])} | changes


def aside(x: torch.Tensor, step: int = 0, start: int = 0) -> torch.Tensor:
    """The same in memory with wider rows, or that starts elsewhere."""
    wide = torch.zeros((*x.shape[:-1], x.shape[-1] + step + start))
    wide[..., start : start + x.shape[-1]] = x
    return wide[..., start : start + x.shape[-1]]


Q, K, V = rows()
BAD: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any], str]] = {
    "dtype": (
        rows(dtype=torch.float16),
        captures(),
        r"no kernels of float16, head dims 16 and 16 for sm_90; it has float32 16",
    ),
    "head dim": (rows(32), captures(), r"no kernels of float32, head dims 32 and 32"),
    "stride": (
        (aside(Q, 1), K, V),
        captures(),
        r"q has stride 680 along dimension 1, no multiple of 16; pass q.contiguous\(\)",
    ),
    "address": (
        (Q, aside(K, 15, 1), V),
        captures(),
        r"k starts at an address that is no multiple of 16 bytes; pass k.clone\(\)",
    ),
    "wide capture": ((Q, K, V), captures(doc=captures()["doc"].long()), r"doc is \*i64, and the kernels take \*i32"),
    "capture with steps": (
        (Q, K, V),
        captures(slope=torch.arange(4.0)[::2]),
        r"slope has stride 2 along its last dimension; pass slope.contiguous\(\)",
    ),
    "offset": ((Q, K, V), captures(q_offset=torch.tensor([0])), r"for q_offset of tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_missing_is_named(name: str, attend: Any, monkeypatch: pytest.MonkeyPatch):
    given, named, says = BAD[name]
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ag.PackError, match=says) as refusal:
        attend(*given, **named)
    assert str(refusal.value).startswith("it: ") and "pip install" in str(refusal.value)


@pytest.mark.parametrize("name", BAD)
def test_what_is_missing_is_compiled_where_a_compiler_is(name: str, attend: Any):
    given, named, says = BAD[name]
    with pytest.warns(ag.AttngenWarning, match=says) as said:
        out = attend(*given, **named)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ag.AttngenWarning)
        again = attend(*given, **named)
    assert len([w for w in said if issubclass(w.category, ag.AttngenWarning)]) == 1
    want = ag.oracle(SPEC, *given, **named)[0]
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
    assert torch.equal(again, out)


def test_another_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "capability", lambda device: (8, 0))
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ag.PackError, match="has kernels for sm_90, and cpu is sm_80"):
        ag.load(folder)["it"](Q, K, V, **captures())


def test_a_pack_without_a_backward(interpreted: Interpreted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    attend = pack_of(tmp_path / "pack", SPEC, ["B1 Hq2 Hkv1 N64 D16"], backward=False)
    with torch.no_grad():
        want = attend(*rows(grad=True), **captures())
    torch.testing.assert_close(attend(Q, K, V, **captures()), want)
    with pytest.warns(ag.AttngenWarning, match="built without a backward, and an argument requires a gradient"):
        attend(*rows(grad=True), **captures()).sum().backward()
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda module: None)
    for given, named in ((rows(grad=True), captures()), ((Q, K, V), captures(slope=torch.ones(2, requires_grad=True)))):
        with pytest.raises(ag.PackError, match="built without a backward"):
            attend(*given, **named)


def test_on_a_cpu_the_spec_is_compiled(attend: Any, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "launches_on", lambda device: device.type == "cuda")
    interpreted.started.clear()
    given = rows(grad=True)
    out = attend(*given, **captures())
    out.sum().backward()
    torch.testing.assert_close(out, ag.compile(SPEC)(*given, **captures()))
    assert given[0].grad is not None and not interpreted.started
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ag.PackError, match=r"it: cpu runs no kernels; .* pip install"):
        attend(*given, **captures())


@pytest.mark.parametrize("change", [{"doc": None}, {"dok": 1}, {"doc": torch.zeros(1, 3).int()}])
def test_errors_are_those_of_compiled_attentions(attend: Any, change: dict[str, Any]):
    refusals = []
    for own in (attend, ag.compile(SPEC)):
        with pytest.raises(ag.InputError) as refusal:
            own(Q, K, V, **captures(**change))
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]


# -- copies, pickles, traced calls ------------------------------------------------------------------------------------


def test_copies_and_pickles(attend: Any, folder: Path):
    assert copy.deepcopy(attend) is attend
    again = pickle.loads(pickle.dumps(attend))
    assert again.contents.pack.digest == attend.contents.pack.digest and again.name == "it"
    assert torch.equal(again(Q, K, V, **captures()), attend(Q, K, V, **captures()))


def test_a_pickle_of_another_pack(interpreted: Interpreted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(pack_of(Path("pack"), ag.Spec(), ["B1 Hq2 Hkv1 N64 D16"], backward=False))
    monkeypatch.chdir("/")
    assert pickle.loads(content).name == "it"
    pack_of(tmp_path / "pack", ag.Spec(mask=ag.causal()), ["B1 Hq2 Hkv1 N64 D16"], backward=False)
    with pytest.raises(ag.PackError, match=f"{tmp_path / 'pack'}: expected the pack that was pickled"):
        pickle.loads(content)


def test_traced_calls(attend: Any):
    named = captures()

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q * 2, k, v, **named) + 1

    runs = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        q, k, v = rows(grad=True)
        function(q, k, v).square().sum().backward()
        runs.append((q.grad, k.grad, v.grad))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want)


def test_transforms(attend: Any):
    named = captures()

    def loss(q: torch.Tensor) -> torch.Tensor:
        return attend(q, K, V, **named).square().sum()

    want = torch.autograd.grad(loss(q := Q.clone().requires_grad_()), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(Q), want)
