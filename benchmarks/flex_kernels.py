"""FlexAttention's own kernels for a GPU that is not here: the templates and the default tiles of the installed torch, the mods traced
and differentiated by torch, and what inductor would print of them, cross-compiled as attngen's kernels are.

Only the hooks that a template calls while it is filled are written here: inductor's own want a GPU. Shapes are constants, as in
the first call of a compiled `flex_attention`. The mods get what they capture as arguments behind their own.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jinja2
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attngen.backends.triton.compiling import compile_function
from attngen.backends.triton.machine_code import MachineCode
from attngen.schedule import Target

KINDS = ("forward", "backward", "decode")
BLOCK = 128  # rows and keys of a block of a block mask, by default
FILES = {
    "forward": ("flex_attention", "utilities", "common"),
    "backward": ("flex_backwards", "utilities"),
    "decode": ("flex_decode", "utilities", "common"),
}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
FLOATS = ("LSE", "DELTA", "M", "L", "MAX")  # float32 operands of the templates; those of block masks are int32
HALVES = ("Q", "K", "V", "DO", "DQ", "DV")

Mod = Callable[..., torch.Tensor]


def no_score(s: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
    """FlexAttention's identity."""
    return s


def no_mask(b: torch.Tensor, h: Any, i: Any, j: Any) -> torch.Tensor:
    """FlexAttention's noop mask."""
    return b.new_ones((), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Problem:
    """What FlexAttention is asked for: sizes, and mods with what they capture.

    captured: of the score, then of the mask: tensors whose sizes, dtypes and requires_grad count, no values.
    """

    head_dim: int
    mask: Mod = no_mask
    score: Mod = no_score
    mask_captures: tuple[torch.Tensor, ...] = ()
    score_captures: tuple[torch.Tensor, ...] = ()
    batch: int = 4
    heads: int = 16
    heads_kv: int = 16
    n_q: int = 4096
    n_k: int = 4096

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.heads_kv


@dataclass(frozen=True)
class Options:
    """Sizes of a kernel's tiles by the template's names, and how it is compiled."""

    blocks: Mapping[str, int] = field(hash=False)
    num_stages: int = 1
    num_warps: int = 4

    def __str__(self) -> str:
        tiles = ", ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{tiles}, num_warps={self.num_warps}, num_stages={self.num_stages}"


# -- the tiles that inductor would take -------------------------------------------------------------------------------


def heuristics(kind: str, head_dim: int, target: Target, every: bool = False) -> list[Options]:
    """What the installed torch tries on a GPU of this architecture, its default last: that alone, or with `every` what
    `max-autotune` searches.
    """
    from torch._inductor import config
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    capability = divmod(int(target.arch), 10)
    with (
        patch("torch.cuda.get_device_capability", lambda *_: capability),
        config.patch(max_autotune=every),
    ):
        found = CUDAConfigHeuristic()
        ask = {
            "forward": found.get_flex_attn_fwd_configs,
            "backward": found.get_flex_attn_bwd_configs,
            "decode": found.get_flex_decode_configs,
        }[kind]
        return [_options(config) for config in ask(head_dim, torch.bfloat16)]


def default(kind: str, head_dim: int, target: Target) -> Options:
    """The tile without autotuning."""
    return heuristics(kind, head_dim, target)[-1]


def _options(config: Any) -> Options:
    blocks = {name.upper(): size for name, size in vars(config).items() if name.startswith("block")}
    return Options(blocks, config.num_stages, config.num_warps)


# -- what inductor prints of a mod ------------------------------------------------------------------------------------


def graphs(problem: Problem) -> dict[str, torch.fx.Graph]:
    """The score, its derivative with the gradients of what it captures, and the mask, as torch traces them."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch._higher_order_ops.flex_attention import create_fw_bw_graph

    def indices() -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros((), dtype=torch.int32) for _ in range(4))

    score = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    with TransformGetItemToIndex():
        _, joint = create_fw_bw_graph(problem.score, (score, *indices()), problem.score_captures)
        plain = [tensor.detach() for tensor in problem.score_captures]
        traced = {
            "score": make_fx(problem.score, tracing_mode="fake")(score.detach(), *indices(), *plain),
            "joint": joint,
            "mask": make_fx(problem.mask, tracing_mode="fake")(*indices(), *problem.mask_captures),
        }
    for module in traced.values():
        module.graph.eliminate_dead_code()
    return {name: module.graph for name, module in traced.items()}


_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "eq": "==",
    "ne": "!=",
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "logical_and": "&",
    "logical_or": "|",
}
_SAME = ("detach", "_to_copy", "clone", "alias")  # inductor computes in float32 between loads and stores


class Printer:
    """Statements of one mod: every operation once, as inductor's common subexpressions are."""

    def __init__(self, captured: Sequence[tuple[str, torch.Tensor]]):
        self.captured, self.lines, self.names = dict(captured), list[str](), dict[str, str]()

    def graph(self, graph: torch.fx.Graph, arguments: Sequence[str], mask: str = "") -> list[str]:
        """The names of the graph's outputs; what scatters into a gradient is written if there is a mask for it."""
        values: dict[torch.fx.Node, str] = {}
        given = iter(arguments)
        for node in graph.nodes:
            if node.op == "placeholder":
                name = next(given)
                values[node] = name if name in self.captured else self._named(f"({name})")
            elif node.op == "call_function":
                values[node] = self._operation(node, [_value(x, values) for x in node.args], mask)
            elif node.op == "output":
                outputs = node.args[0]
                return [values[x] for x in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if x]
        raise ValueError("a graph without an output")

    def _operation(self, node: torch.fx.Node, found: list[Any], mask: str) -> str:
        name = str(node.target).split(".")[1]
        if name in _SAME:
            return str(found[0])
        if name in _INFIX:
            return self._named(f"{_operand(found[0])} {_INFIX[name]} {_operand(found[1])}")
        if name == "div":  # by a constant: its reciprocal, as on a GPU
            return self._named(f"{found[0]} * {_operand(1 / found[1])}")
        if name == "tanh":
            return self._named(f"libdevice.tanh({found[0]})")
        if name == "tanh_backward":
            square = self._named(f"{found[1]} * {found[1]}")
            rest = self._named(f"{_operand(1.0)} - {square}")
            return self._named(f"{found[0]} * {rest}")
        if name in ("full", "new_ones", "ones", "scalar_tensor"):
            return self._named("tl.full([1], True, tl.int1)")
        if name == "index":
            tensor = self.captured[found[0]]
            cast = ".to(tl.float32)" if tensor.dtype == torch.bfloat16 else ""
            return self._named(f"tl.load({found[0]} + {_place(tensor.shape, found[1])}){cast}")
        if name == "zeros_and_scatter":
            shape, indices, value = found
            if mask:
                place = f"tl.broadcast_to({_place(shape, indices)}, {value}.shape)"
                self.lines.append(f"tl.atomic_add(out_grad + {place}, {value}, {mask}, sem='relaxed')")
            return str(value)
        raise NotImplementedError(
            f"a mod's {node.target}: add what inductor prints of it to benchmarks/flex_kernels.py"
        )

    def _named(self, text: str) -> str:
        if text not in self.names:
            self.names[text] = f"tmp{len(self.names)}"
            self.lines.append(f"{self.names[text]} = {text}")
        return self.names[text]


def _value(x: Any, values: Mapping[torch.fx.Node, str]) -> Any:
    if isinstance(x, torch.fx.Node):
        return values[x]
    return [_value(part, values) for part in x] if isinstance(x, (list, tuple)) else x


def _operand(x: Any) -> str:
    if isinstance(x, str):
        return x
    return f"tl.full([1], {x!r}, {'tl.float32' if isinstance(x, float) else 'tl.int32'})"


def _place(shape: Sequence[int], indices: Sequence[str]) -> str:
    strides = _contiguous(shape)
    return "(" + " + ".join(f"{stride}*{index}" for stride, index in zip(strides, indices, strict=True)) + ")"


# -- filling a template -----------------------------------------------------------------------------------------------


@cache
def _template(kind: str) -> jinja2.Template:
    folder = Path(torch.__file__).parent / "_inductor" / "kernel" / "flex" / "templates"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["indent_except_first"] = lambda text, levels: text.replace("\n", "\n" + "    " * levels)
    text = "\n".join((folder / f"{name}.py.jinja").read_text(encoding="utf-8") for name in FILES[kind])
    return environment.from_string(text.lstrip())


class Filling:
    """One template with its hooks, for one problem and one tile."""

    def __init__(self, kind: str, problem: Problem, options: Options, splits: int = 1):
        self.kind, self.problem, self.options, self.splits = kind, problem, options, splits
        self.graphs = graphs(problem)
        captured = (*problem.score_captures, *problem.mask_captures)
        self.captured = [(f"in_{number}", tensor) for number, tensor in enumerate(captured)]
        self.of_score = [name for name, _ in self.captured[: len(problem.score_captures)]]
        self.of_mask = [name for name, _ in self.captured[len(problem.score_captures) :]]
        self.has_gradient = kind == "backward" and any(x.requires_grad for x in problem.score_captures)
        self.operands: tuple[str, ...] = ()

    def text(self) -> str:
        """The kernel's file."""
        hooks = (self.def_kernel, self.stride, self.size, self.gen_argdefs, self.gen_defines, self.modification)
        named = {hook.__name__: hook for hook in (*hooks, self.store_output)}
        return _template(self.kind).render(**named, HAS_FULL_BLOCKS=True, USE_TMA=False)

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of the arguments, in their order; complete once the text was made."""
        types = {f"arg_{name}": "*bf16" if name in HALVES else "*fp32" if name in FLOATS else "*i32"
                 for name in self.operands}  # fmt: skip
        types |= {name: "*" + TYPES[tensor.dtype] for name, tensor in self.captured}
        types |= {"out_grad": "*fp32"} if self.has_gradient else {}
        return types | {"out_ptr0": "*fp32" if self.kind == "decode" else "*bf16"}

    def def_kernel(self, *operands: str) -> str:
        self.operands = operands
        lines = [*self.gen_defines().splitlines(), *(f"{name} = arg_{name}" for name in operands)]
        head = "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n"
        return f"{head}\n@triton.jit\ndef kernel({self.gen_argdefs()}):\n" + "".join(f"    {line}\n" for line in lines)

    def gen_argdefs(self) -> str:
        return ", ".join(self.signature)

    def gen_defines(self) -> str:
        problem, d = self.problem, self.problem.head_dim
        rounded = 1 << (d - 1).bit_length()
        constants = {
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": True,
            "OUTPUT_MAX": False,
            "FLOAT32_PRECISION": "'ieee'",
            "IS_DIVISIBLE": problem.n_q % BLOCK == 0 and problem.n_k % BLOCK == 0,
            "SM_SCALE": 1 / math.sqrt(d),
            "GQA_SHARED_HEADS": problem.group,
            "HAS_FULL_BLOCKS": True,
            "QK_HEAD_DIM": d,
            "QK_HEAD_DIM_ROUNDED": rounded,
            "V_HEAD_DIM": d,
            "V_HEAD_DIM_ROUNDED": rounded,
            "SAFE_HEAD_DIM": rounded == d,
            "USE_TMA": False,
            "SPARSE_Q_BLOCK_SIZE": BLOCK,
            "SPARSE_KV_BLOCK_SIZE": BLOCK,
            **self.options.blocks,
        }
        if self.kind == "decode":
            rows = problem.n_q * problem.group
            block = max(1 << (rows - 1).bit_length(), 16)
            constants |= {"BLOCK_M": block, "SPLIT_KV": self.splits}
            constants |= {"SAFE_M_BOUNDARY": rows % block == 0, "SAFE_N_BOUNDARY": True}
        lines = [f"{name} : tl.constexpr = {value}" for name, value in constants.items()]
        return "\n".join([*lines, "INDEX_DTYPE : tl.constexpr = tl.int32"]) + "\n"

    def shape(self, name: str) -> tuple[int, ...]:
        p = self.problem
        if self.kind == "decode" and name == "Q":
            return p.batch, p.heads_kv, p.group, p.n_q, p.head_dim
        if self.kind == "decode" and name in ("M", "L"):
            return p.batch, self.splits, p.heads, p.n_q
        if name in HALVES:
            queries = name in ("Q", "DO", "DQ")
            return p.batch, p.heads if queries else p.heads_kv, p.n_q if queries else p.n_k, p.head_dim
        blocks_q, blocks_k = -(-p.n_q // BLOCK), -(-p.n_k // BLOCK)
        owners, others = (blocks_q, blocks_k) if "KV" in name else (blocks_k, blocks_q)
        return (1, 1, owners, others) if name.endswith("IDX") else (1, 1, owners)

    def stride(self, name: str, place: int | None = None) -> str:
        strides = _contiguous(self.shape(name))
        return ", ".join(map(str, strides)) if place is None else str(strides[place])

    def size(self, name: str, place: int) -> str:
        return str(self.shape(name)[place])

    def store_output(
        self, indices: Sequence[str], value: str, mask: str, indent_width: int = 4, val_shape: Any = None
    ) -> str:
        p = self.problem
        shape = (p.batch, self.splits, p.heads, p.n_q, p.head_dim) if self.kind == "decode" else self.shape(
            "K" if self.kind == "backward" else "Q")  # fmt: skip
        place = f"tl.broadcast_to({_place(shape, indices)}, {value}.shape)"
        return f"xindex = {place}\n{' ' * indent_width}tl.store(out_ptr0 + xindex, {value}, {mask})"

    def modification(
        self,
        subgraph_number: int,
        output_name: str | None,
        mask: str = "",
        score: str = "",
        grad_score_mod: str = "",
        b: str = "",
        h: str = "",
        m: str = "",
        n: str = "",
        **_: Any,
    ) -> str:
        which = ("score", "joint", "mask", "scatter") if self.kind == "backward" else ("score", "mask")
        graph, pair = which[subgraph_number], (b, h, m, n)
        printer = Printer(self.captured)
        if graph == "scatter":
            if not self.has_gradient:
                return ""
            printer.graph(self.graphs["joint"], (score, *pair, grad_score_mod, *self.of_score), mask)
            return "\n".join(printer.lines)
        arguments = {
            "score": (score, *pair, *self.of_score),
            "joint": (score, *pair, grad_score_mod, *self.of_score),
            "mask": (*pair, *self.of_mask),
        }[graph]
        found = printer.graph(self.graphs[graph], arguments)[0]
        return "\n".join([*printer.lines, f"{output_name} = {found}"])


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return strides[::-1]


# -- compiling --------------------------------------------------------------------------------------------------------


def compiled(kind: str, problem: Problem, options: Options, target: Target, splits: int = 1) -> MachineCode:
    """One of `KINDS`. ScheduleError where it needs more shared memory than there is."""
    filling = Filling(kind, problem, options, splits)
    text = filling.text()
    with tempfile.TemporaryDirectory() as folder:
        function = _loaded(Path(folder) / "kernel.py", text)
        return compile_function(
            f"flex_{kind}", function, filling.signature, list(filling.signature), options.num_warps, options.num_stages, target
        )  # fmt: skip


def _loaded(path: Path, text: str) -> Any:
    """Triton reads the source of a function from its file."""
    path.write_text(text, encoding="utf-8")
    described = importlib.util.spec_from_file_location("attngen_flex_kernel", path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module  # triton looks its functions up by module
    described.loader.exec_module(module)
    return module.kernel


def decode_splits(problem: Problem, processors: int) -> int:
    """inductor's number: two programs for each multiprocessor."""
    return max(1, processors // max(1, problem.batch * problem.heads_kv) * 2)


def every(kind: str, head_dim: int, target: Target) -> Iterator[Options]:
    """What `max-autotune` searches, each once."""
    seen = set()
    for options in heuristics(kind, head_dim, target, every=True):
        if str(options) not in seen:
            seen.add(str(options))
            yield options
