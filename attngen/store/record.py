"""What is remembered: a key (what was tuned, where, by which code) and the best schedule known for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from attngen.errors import AttngenWarning, StoreError
from attngen.store.device import Device

KINDS = ("measured", "modelled")
NOISY = 0.3  # a spread beyond which schedules that differ by as much cannot be told apart
MAX_TEXT = 4096  # no field of an honest record is longer, but for
MAX_SPEC = 32 * 1024  # the spec's text

_SHAPE_WORDS = {
    "b": "batch",
    "hq": "heads_q",
    "hkv": "heads_kv",
    "h": "heads",
    "nq": "n_q",
    "nk": "n_k",
    "n": "n",
    "d": "head_dim",
    "dv": "head_dim_v",
}


class StoreWarning(AttngenWarning):
    """The record database cannot be used as asked; attngen goes on without it."""


def bucket(size: int) -> int:
    """The next power of two at or above `size` (0 stays 0): sizes in one bucket share a record."""
    if size < 0:
        raise StoreError(f"a size to bucket must not be negative, got {size}")
    return size if size < 2 else 1 << (size - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one attention call: q [batch, heads_q, n_q, head_dim], k and v [batch, heads_kv, n_k, ...]."""

    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    head_dim: int
    head_dim_v: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StoreError(f"shape: {field.name} must be a positive int, got {value!r}")
        if self.heads_q % self.heads_kv:
            raise StoreError(f"shape: heads_q must be a multiple of heads_kv, got {self.heads_q} and {self.heads_kv}")

    @classmethod
    def of(cls, given: Any) -> Shape:
        """From a Shape, a dict of its fields, text ("B1 H8 N4096 D64"), (B, H, N, D), or (q.shape, k.shape, v.shape).

        Text and dicts may say `h` for hq and hkv, `n` for nq and nk; `dv` defaults to `d`, `b` to 1.
        """
        if isinstance(given, Shape):
            return given
        if isinstance(given, str):
            return cls._from_words(_parse_words(given))
        if isinstance(given, Mapping):
            return cls._from_words({str(name): value for name, value in given.items()})
        try:
            items = list(given)
        except TypeError:
            items = []
        if len(items) == 4 and all(isinstance(x, int) for x in items):
            batch, heads, n, d = items
            return cls(batch, heads, heads, n, n, d, d)
        if len(items) in (2, 3) and not any(isinstance(x, int) for x in items):
            q, k, v = (tuple(getattr(x, "shape", x)) for x in (items if len(items) == 3 else [*items, items[-1]]))
            if len(q) == len(k) == len(v) == 4:
                return cls(q[0], q[1], k[1], q[2], k[2], q[3], v[3])
        raise StoreError(
            f"shape: expected 'B1 Hq8 Hkv2 N4096 D64', (B, H, N, D), or the shapes of q, k and v, got {given!r:.200}"
        )

    @classmethod
    def _from_words(cls, words: Mapping[str, Any]) -> Shape:
        known = {_SHAPE_WORDS.get(name.lower(), name): value for name, value in words.items()}
        heads, n = known.pop("heads", None), known.pop("n", None)
        if heads is not None:
            known = {"heads_q": heads, "heads_kv": heads} | known
        if n is not None:
            known = {"n_q": n, "n_k": n} | known
        if "heads_q" in known:
            known.setdefault("heads_kv", known["heads_q"])
        if "n_q" in known:
            known.setdefault("n_k", known["n_q"])
        known.setdefault("batch", 1)
        if "head_dim" in known:
            known.setdefault("head_dim_v", known["head_dim"])
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(known) - names):
            raise StoreError(f"shape: unknown field {unknown[0]!r}; known are {', '.join(sorted(_SHAPE_WORDS))}")
        if missing := sorted(names - set(known)):
            raise StoreError(f"shape: {', '.join(missing)} not given; write e.g. 'B1 Hq8 Hkv2 N4096 D64'")
        return cls(**known)

    def __str__(self) -> str:
        dv = "" if self.head_dim_v == self.head_dim else f" Dv{self.head_dim_v}"
        heads = f"H{self.heads_q}" if self.heads_q == self.heads_kv else f"Hq{self.heads_q} Hkv{self.heads_kv}"
        n = f"N{self.n_q}" if self.n_q == self.n_k else f"Nq{self.n_q} Nk{self.n_k}"
        return f"B{self.batch} {heads} {n} D{self.head_dim}{dv}"


def _parse_words(text: str) -> dict[str, int]:
    words: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"([A-Za-z]{1,3})=?([0-9]{1,12})", word)
        if match is None or match[1].lower() not in _SHAPE_WORDS:
            raise StoreError(f"shape: cannot read {word!r} in {text!r}; write e.g. 'B1 Hq8 Hkv2 N4096 D64'")
        words[match[1].lower()] = int(match[2])
    return words


@dataclass(frozen=True, slots=True)
class Versions:
    """What else decides a kernel's speed: compiler, driver, our own generator. Empty where it does not matter."""

    generator: str = ""  # hash of attngen's templates and printers
    triton: str = ""
    torch: str = ""  # only where torch does the work: the CPU backend
    fp_fusion: bool = True


@dataclass(frozen=True, slots=True)
class Key:
    """Identifies a record. The last five fields are buckets; `family` is everything but versions and buckets."""

    spec_key: str
    piece: str  # which kernel of the plan: "forward", "backward", ...
    dtype: str  # "bfloat16"
    head_dim: int
    head_dim_v: int
    device: str
    units: int  # streaming multiprocessors of a GPU, threads of a CPU
    memory: int  # GiB, rounded; 0 for a CPU
    fp_fusion: bool
    driver: str
    triton: str
    torch: str
    generator: str
    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            expected = {"str": str, "int": int, "bool": bool}[str(field.type)]
            if type(value) is not expected:
                raise StoreError(f"record key: {field.name} must be {field.type}, got {value!r}")
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise StoreError(f"record key: {field.name} is longer than {MAX_TEXT} characters")
            if isinstance(value, int) and not 0 <= value < 1 << 62:
                raise StoreError(f"record key: {field.name} must be between 0 and 2^62, got {value}")
        for name in BUCKETS:
            if bucket(getattr(self, name)) != getattr(self, name):
                raise StoreError(f"record key: {name} must be a power of two, got {getattr(self, name)}")

    @classmethod
    def of(cls, spec_key: str, piece: str, dtype: str, shape: Shape, device: Device, versions: Versions) -> Key:
        return cls(
            spec_key=spec_key,
            piece=piece,
            dtype=str(dtype).removeprefix("torch."),
            head_dim=shape.head_dim,
            head_dim_v=shape.head_dim_v,
            device=str(device.name),
            units=device.units,
            memory=device.memory,
            fp_fusion=versions.fp_fusion,
            driver=str(device.driver),
            triton=str(versions.triton),
            torch=str(versions.torch),  # torch.__version__ is a subclass of str
            generator=str(versions.generator),
            batch=bucket(shape.batch),
            heads_q=bucket(shape.heads_q),
            heads_kv=bucket(shape.heads_kv),
            n_q=bucket(shape.n_q),
            n_k=bucket(shape.n_k),
        )

    @property
    def family(self) -> tuple[str | int | bool, ...]:
        """Records of one family are about the same kernel on the same hardware."""
        return tuple(getattr(self, name) for name in FAMILY)

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in VERSIONS)

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in BUCKETS)

    def distance(self, other: Key) -> float:
        """Sum of the buckets' distances in log2 space."""
        pairs = zip(self.buckets, other.buckets, strict=True)
        return sum(abs(math.log2(max(a, 1)) - math.log2(max(b, 1))) for a, b in pairs)

    def shape_text(self) -> str:
        return f"B{self.batch} Hq{self.heads_q} Hkv{self.heads_kv} Nq{self.n_q} Nk{self.n_k}"


KEY_FIELDS = tuple(field.name for field in fields(Key))
BUCKETS = ("batch", "heads_q", "heads_kv", "n_q", "n_k")
VERSIONS = ("driver", "triton", "torch", "generator")
FAMILY = tuple(name for name in KEY_FIELDS if name not in BUCKETS and name not in VERSIONS)


@dataclass(frozen=True, slots=True)
class Record:
    """The best schedule known for a key, and how well that is known."""

    key: Key
    schedule: dict[str, Any]  # plain JSON values
    seconds: float
    spread: float  # (80th - 20th percentile) / median; 0 when modelled
    kind: str  # "measured" on that device, or "modelled" without it
    error: float  # the check's error over what its rule allows (at most 1); 0 when modelled
    made_at: str  # UTC, ISO 8601
    source: str  # "attngen tune", a file that was imported, ...
    spec: str = ""  # what was tuned, the canonical text that `key.spec_key` is the hash of; "" in records made before there was one

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StoreError(f"record: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.schedule, dict) or not all(isinstance(name, str) for name in self.schedule):
            raise StoreError(f"record: schedule must be a dict with text keys, got {self.schedule!r}")
        for name in ("seconds", "spread", "error"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise StoreError(f"record: {name} must be a finite number >= 0, got {value!r}")
        if not self.seconds > 0:
            raise StoreError("record: seconds must be positive, got 0")
        for name, most in (("made_at", MAX_TEXT), ("source", MAX_TEXT), ("spec", MAX_SPEC)):
            if not isinstance(getattr(self, name), str) or len(getattr(self, name)) > most:
                raise StoreError(f"record: {name} must be text of at most {most} characters")

    @property
    def noisy(self) -> bool:
        """Whether its times were so far apart that another schedule may be as good: worth tuning again on a quiet machine."""
        return self.spread > NOISY

    @property
    def time_text(self) -> str:
        """ "measured 1.23 ms, spread 4%", with a mark where that is too much; "modelled 1.23 ms"."""
        spread = f", spread {self.spread:.0%}" if self.kind == "measured" else ""
        return f"{self.kind} {time_text(self.seconds)}{spread}{', too noisy' if self.noisy else ''}"


def time_text(seconds: float) -> str:
    """ "1.23 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def better(new: Record, old: Record) -> bool:
    """Whether `new` should replace `old`: measured beats modelled, then the smaller time."""
    if new.kind != old.kind:
        return new.kind == "measured"
    return new.seconds < old.seconds


def best_of(records: Iterable[Record]) -> dict[Key, Record]:
    """The best record of each key."""
    best: dict[Key, Record] = {}
    for record in records:
        old = best.get(record.key)
        if old is None or better(record, old):
            best[record.key] = record
    return best


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
