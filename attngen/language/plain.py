"""A spec as plain data: what a call is checked against and planned from, without the symbolic language. Packs carry these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from attngen.language.indices import Doubtful
from attngen.language.keyset import KeySet
from attngen.language.lists import Lists
from attngen.language.programs import Node


@dataclass(frozen=True)
class PlainTensor:
    """A captured tensor's declaration, see `ag.Tensor`."""

    name: str
    ndim: int
    kind: str

    def text(self) -> str:
        return f"tensor {self.name}: {self.kind}[{self.ndim}]"


@dataclass(frozen=True)
class PlainParam:
    """A number's declaration, see `ag.Param`."""

    name: str
    number_kind: str

    def text(self) -> str:
        return f"param {self.name}: {self.number_kind}"


@dataclass(frozen=True, eq=False)
class PlainSpec:
    """What `attngen.language.spec.Spec` has for calls. known: `attngen.analysis.call_facts.CallFacts`; inner: by role the specs that
    a key set's calls are made of; ranges: `Spec.doubtful` by (q_offset is a tensor, with the sink).
    """

    key: str = ""
    text: str = ""
    tensors: Mapping[str, PlainTensor] = field(default_factory=dict)
    params: Mapping[str, PlainParam] = field(default_factory=dict)
    scale: float | None = None
    mask: Node = field(default_factory=lambda: Node("bool", (), True))
    mask_text: str = "true"
    is_causal: bool = False
    sink: Node | None = None
    dropout_param: str | None = None
    seeded: bool = False  # whether it has dropout
    keys: KeySet | None = None
    lists: Lists | None = None
    page_size: int | None = None
    plain_dims: Mapping[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    mask_reads: tuple[str, ...] = ()
    sink_reads: tuple[str, ...] = ()
    mask_params: tuple[str, ...] = ()
    ranges: Mapping[tuple[bool, bool], tuple[Doubtful, ...]] = field(default_factory=dict)
    known: Any = None
    inner: Mapping[str, PlainSpec] = field(default_factory=dict)
    name: str = ""

    @cached_property
    def call_params(self) -> dict[str, PlainParam]:
        """The numbers that a call may give by name."""
        return {**self.params, "scale": _SCALE}

    @property
    def dropout(self) -> Any:
        """Something, for a spec with dropout."""
        return self.seeded or None

    def scale_for(self, head_dim: int) -> float:
        """The factor on q.k for this head dim."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale

    def doubtful(self, by_offset: bool, sink: bool = True) -> tuple[Doubtful, ...]:
        """The loads whose range a call's shapes do not tell, see `attngen.language.indices`."""
        return self.ranges.get((by_offset, sink), ())

    def __repr__(self) -> str:
        return f"<PlainSpec {self.name or self.key[:12]}>"


_SCALE = PlainParam("scale", "float")
PLAIN: Any = PlainSpec()
