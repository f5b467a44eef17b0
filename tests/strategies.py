"""Random specs as text that both the parser and torch can read: torch's own operators give the expected values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

import attngen as ag

SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]

TENSORS = [
    ag.Tensor("doc", 2, dtype=torch.int32),
    ag.Tensor("length", 1, dtype=torch.int32),
    ag.Tensor("keep", 2, dtype=torch.bool),
    ag.Tensor("slope", 1),
    ag.Tensor("row_bias", 3),
    ag.Tensor("col_bias", 2),
    ag.Tensor("table", 2),
]
PARAMS = [ag.Param("width"), ag.Param("shift"), ag.Param("gain", float)]


@dataclass(frozen=True)
class Case:
    """One attention problem: spec text, sizes and a seed for everything random."""

    mask: str
    score: str
    batch: int
    heads_kv: int
    group: int
    n_q: int
    n_k: int
    head_dim: int
    head_dim_v: int
    q_offset: int
    width: int
    shift: int
    gain: float
    seed: int
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def spec(self, **more: Any) -> ag.Spec:
        return ag.Spec(mask=self.mask, score=self.score, params=PARAMS, tensors=TENSORS, **more)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.heads_kv * self.group
        shapes = [
            (self.batch, heads, self.n_q, self.head_dim),
            (self.batch, self.heads_kv, self.n_k, self.head_dim),
            (self.batch, self.heads_kv, self.n_k, self.head_dim_v),
        ]
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return q, k, v

    def values(self) -> dict[str, Any]:
        """Every capture that a spec may mention."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        positions = max(self.n_q + self.q_offset, self.n_k)
        heads = self.heads_kv * self.group
        return {
            "doc": (torch.rand(self.batch, positions, generator=generator) * 4).int().sort(-1).values,
            "length": torch.randint(0, self.n_k + 1, (self.batch,), generator=generator, dtype=torch.int32),
            "keep": torch.rand(self.batch, positions, generator=generator) < 0.7,
            "slope": torch.randn(heads, generator=generator) * 0.1,
            "row_bias": torch.randn(self.batch, heads, positions, generator=generator),
            "col_bias": torch.randn(heads, positions, generator=generator),
            "table": torch.randn(heads, 8, generator=generator),
            "width": self.width,
            "shift": self.shift,
            "gain": self.gain,
        }

    def captures(self, spec: ag.Spec) -> dict[str, Any]:
        values = self.values()
        return {name: values[name] for name in [*spec.tensors, *spec.params]}


_small = st.integers(0, 40)
_atoms = st.one_of(
    st.sampled_from(["i >= j", "i > j", "j < width", "i < shift", "i != j", "true"]),
    st.builds(lambda c: f"i - j < {c}", _small),
    st.builds(lambda c: f"i - j >= {c} - shift", _small),
    st.builds(lambda c: f"abs(i - j) <= {c}", _small),
    st.builds(lambda a, c: f"{a} * i - j + {c} > width", st.sampled_from([1, 2]), _small),
    st.builds(lambda c: f"i // {c} >= j // {c}", st.integers(1, 9)),
    st.builds(lambda c: f"(i - j) % {c} == 0", st.integers(1, 5)),
    st.builds(lambda c: f"(i + h) % {c} < 2", st.integers(2, 5)),
    st.sampled_from(["doc[b, i] == doc[b, j]", "doc[b, i] >= doc[b, j]", "j < length[b]", "keep[b, j]", "keep[b, i]"]),
    st.builds(lambda c: f"max(i, j) - min(i, {c}) < width", _small),
)
masks = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"({a}) & ({b})", inner, inner),
        st.builds(lambda a, b: f"({a}) | ({b})", inner, inner),
        st.builds(lambda a: f"~({a})", inner),
    ),
    max_leaves=5,
)
_terms = st.sampled_from(
    [
        "slope[h] * (j - i)",
        "row_bias[b, h, i]",
        "col_bias[h, j]",
        "table[h, min(max(i - j, 0), 7)]",
        "gain",
        "where(i >= j, 0.5, 0.0 - gain)",
        "0.01 * abs(i - j)",
    ]
)
_shapes = st.sampled_from(
    ["s", "3 * tanh(s / 3)", "s * sigmoid(s)", "min(s, 2.0)", "s * gain", "where(s > 0, s, s / 2)"]
)
scores = st.builds(lambda shape, terms: " + ".join([shape, *terms]), _shapes, st.lists(_terms, max_size=2, unique=True))


@st.composite
def cases(draw: st.DrawFn, sizes: list[int] = SIZES) -> Case:
    return Case(
        mask=draw(masks),
        score=draw(st.one_of(st.just("s"), scores)),
        batch=draw(st.integers(1, 2)),
        heads_kv=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 4, 8])),
        n_q=draw(st.sampled_from(sizes)),
        n_k=draw(st.sampled_from(sizes)),
        head_dim=draw(st.sampled_from([16, 20, 32, 48])),
        head_dim_v=draw(st.sampled_from([16, 24, 32])),
        q_offset=draw(st.sampled_from([0, 0, 5, 64])),
        width=draw(st.integers(1, 60)),
        shift=draw(st.integers(-20, 20)),
        gain=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def by_torch(text: str, env: dict[str, Any]) -> Any:
    """The value of a spec's text computed by Python on torch tensors: independent of attngen's own reading of it."""

    class Plain:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor

        def __getitem__(self, indices: Any) -> torch.Tensor:
            places = [torch.as_tensor(p) for p in (indices if isinstance(indices, tuple) else (indices,))]
            return self.tensor[tuple(torch.clamp(p, 0, n - 1) for p, n in zip(places, self.tensor.shape, strict=True))]

    def tensor(x: Any) -> torch.Tensor:
        return torch.as_tensor(x)

    names: dict[str, Any] = {
        "true": torch.tensor(True),
        "min": lambda a, b: torch.minimum(*torch.broadcast_tensors(tensor(a), tensor(b))),
        "max": lambda a, b: torch.maximum(*torch.broadcast_tensors(tensor(a), tensor(b))),
        "where": lambda c, a, b: torch.where(c, tensor(a), tensor(b)),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        **{
            name: Plain(value) if isinstance(value, torch.Tensor) and name in _CAPTURED else value
            for name, value in env.items()
        },
    }
    return eval(text, {"__builtins__": {"abs": abs}}, names)  # tests only: the text is made above


_CAPTURED = {tensor.name for tensor in TENSORS}
