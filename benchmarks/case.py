"""What a case is: one row of a table, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FORWARD, BACKWARD, TRAINING = "forward", "backward", "training"
DIRECTIONS = (FORWARD, BACKWARD, TRAINING)  # training: forward and backward together

SDPA = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
CPU_SDPA = ("sdpa-flash", "sdpa-math")
DENSE = ("attngen", *SDPA, "flex", "flashinfer", "cudnn-flex")
# attngen's own schedules, beside the one it chooses. Warps can be specialised only where there is no mask.
HOPPER = ("attngen-tma", "attngen-persistent", "attngen-by-head")
SPLITS = ("attngen-no-split", "attngen-split-8", "attngen-stream", "attngen-paged")


@dataclass(frozen=True)
class System:
    """A sparse system, beside dense attention on the same inputs. name: of its records. key_set: one of
    `benchmarks.seeds.KEY_SETS`, which reads the settings.
    """

    name: str
    key_set: str
    settings: tuple[tuple[str, Any], ...] = ()

    def setting(self, name: str) -> Any:
        """The value of one setting. KeyError if the system has none of that name."""
        return dict(self.settings)[name]


@dataclass(frozen=True)
class Case:
    """One row of a table. `settings`: what the pattern or the suite's measurement needs besides sizes.

    peers: names of records, attngen first; those of `systems` are sparse systems, all others compute the pattern. table,
    column: the place in a paper's table (`benchmarks.papers`) that the case stands for, if any.
    """

    suite: str
    pattern: str
    direction: str
    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    head_dim: int
    dtype: str
    peers: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    systems: tuple[System, ...] = ()
    table: str = ""
    column: str = ""

    def setting(self, name: str) -> Any:
        """The value of one setting. KeyError if the case has none of that name."""
        return dict(self.settings)[name]

    @property
    def group(self) -> str:
        """The case without batch and length: what belongs into one panel of a chart."""
        heads = f"H{self.heads_q}" if self.heads_q == self.heads_kv else f"Hq{self.heads_q} Hkv{self.heads_kv}"
        return f"{self._title} {self.direction} {heads} D{self.head_dim} {self.dtype}"

    @property
    def id(self) -> str:
        """Names the case within its suite; results are kept and resumed by it."""
        n = f"N{self.n_k}" if self.n_q == self.n_k else f"Nq{self.n_q} Nk{self.n_k}"
        return f"{self.group} B{self.batch} {n}"

    @property
    def _title(self) -> str:
        values = [f"{name}={_short(value)}" for name, value in self.settings]
        return " ".join([self.table, self.pattern, *values]).strip()


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(f"{value.count(x)}x{x}" if value.count(x) > 1 else str(x) for x in dict.fromkeys(value))
    return str(value)


@dataclass(frozen=True)
class Sizes:
    """How large: `small` is for a CPU and for trying the harness; `full` is for a GPU."""

    small: bool
    cuda: bool

    @property
    def dtype(self) -> str:
        """bfloat16 on a GPU; a CPU's own kernels are float32."""
        return "bfloat16" if self.cuda else "float32"

    def peers(self, *names: str) -> tuple[str, ...]:
        """attngen and those of the names that make sense on the device."""
        if not self.cuda:
            names = tuple(
                dict.fromkeys("sdpa-math" if name in ("sdpa-cudnn", "sdpa-efficient") else name for name in names)
            )
            of_gpu = {"flex-max-autotune", "flashinfer", "cudnn-flex", *HOPPER, "attngen-warp-specialize", *SPLITS} - {
                "attngen-paged"
            }
            names = tuple(name for name in names if name not in of_gpu)
        return ("attngen", *(name for name in names if name != "attngen"))
