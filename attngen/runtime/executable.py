"""A spec's plans bound to one signature of calls: what `attn(...)` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from attngen import debug
from attngen.language.call import Call
from attngen.language.keyset import KeySet
from attngen.plan.backward import backward_plan, saved_by
from attngen.plan.plan import Plan, Sizes
from attngen.plan.steps import DLSE, DO, LSE, OUT, Attend
from attngen.runtime.executor import KEPT, Executor, inputs_of
from attngen.runtime.preparation import Preparation

if TYPE_CHECKING:
    from attngen.language.spec import Spec


Gradients = dict[str, torch.Tensor]


class Executable:
    """The forward's plan, the backward's (made when first asked for), and the executor that runs both.

    keys: the spec's key set, or the lengths of a ragged call.
    """

    def __init__(self, spec: Spec, keys: KeySet | None, plan: Plan, executor: Executor, backend: str):
        self.spec, self.keys, self.executor, self.backend = spec, keys, executor, backend
        self.forward_plan = plan
        debug.say(5, "plan", plan)
        self._backward: dict[frozenset[str], Plan] = {}
        self._training: dict[frozenset[str], Plan] = {}

    def backward_plan(self, wanted: frozenset[str]) -> Plan:
        """The plan of these gradients."""
        found = self._backward.get(wanted)
        if found is None:
            found = self._backward[wanted] = backward_plan(self.forward_plan, wanted, self.backend)
            debug.say(5, "plan", found)
        return found

    def training_plan(self, wanted: frozenset[str]) -> Plan:
        """The forward that keeps what the backward of these gradients reads."""
        found = self._training.get(wanted)
        if found is None:
            saved = saved_by(self.forward_plan, self.backward_plan(wanted))
            found = self._training[wanted] = replace(self.forward_plan, saved=saved)
        return found

    @cached_property
    def everything(self) -> Plan:
        """The backward of all inputs that can have a gradient."""
        return self.backward_plan(frozenset({"q", "k", "v"}))

    def prepare(self, call: Call, given: Mapping[str, Any], sizes: Sizes) -> Preparation:
        """What serves other calls too, in both directions unless the call wants no gradient."""
        buffers = inputs_of(call, given)
        have = {*buffers}
        plans = [self.forward_plan, *([self.everything] if call.wants_grad and call.spec.page_size is None else [])]
        for plan in plans:
            self.executor.prepare(plan, call, given, buffers)
        steps = [step for plan in plans for step in plan.preparation]
        made = {write: buffers[write] for s in steps for write in s.writes if write in buffers and write not in have}
        done = [step for step in steps if {*step.writes} & made.keys()]
        reads = {n: buffers[n] for s in done for n in s.reads if n in have and n not in ("q", "k", "v", "q_offset")}
        params = {n: call.params[n] for s in done for n in s.params if n in call.params}
        return Preparation.of(self.spec, self.keys, sizes, call, reads, params, made)

    def forward(
        self, call: Call, given: Mapping[str, Any], prepared: Mapping[str, Any] = {}
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse."""
        return self.forward_and_kept(call, given, prepared)[:2]

    def forward_and_kept(
        self, call: Call, given: Mapping[str, Any], prepared: Mapping[str, Any] = {}
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """out, lse, and of a plan of one attention what its backend keeps for the backward, which takes it as `kept_name`."""
        buffers = {**inputs_of(call, given), **prepared}
        self.executor.run(self.forward_plan, call, buffers)
        out, lse = (buffers[name] for name in self.forward_plan.results)
        return out, lse, buffers.get(self.kept_name)

    @cached_property
    def kept_name(self) -> str:
        """What the backend of a plan's only attention keeps."""
        return next(step.name for step in self.forward_plan.steps if isinstance(step, Attend)) + KEPT

    def forward_keeping(
        self, call: Call, given: Mapping[str, Any], prepared: Mapping[str, Any], wanted: frozenset[str]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """out, lse, and what a backward of these gradients reads besides the inputs."""
        plan = self.training_plan(wanted)
        buffers = {**inputs_of(call, given), **prepared}
        self.executor.run(plan, call, buffers)
        by_backends = tuple(name for name in buffers if name.endswith(KEPT))
        kept = {name: buffers[name] for name in (*plan.prepared, *plan.saved, *by_backends) if name in buffers}
        out, lse = (buffers[name] for name in plan.results)
        # Of an earlier forward nothing is left that this one did not keep.
        return out, lse, {**{name: x for name, x in prepared.items() if not name.endswith(KEPT)}, **kept}

    def backward(
        self,
        call: Call,
        given: Mapping[str, Any],
        kept: Mapping[str, Any],
        out: torch.Tensor,
        lse: torch.Tensor,
        do: torch.Tensor,
        dlse: torch.Tensor | None,
        wanted: frozenset[str],
    ) -> Gradients:
        """The wanted gradients, each of its tensor's shape and dtype. dlse: None for 0."""
        plan = self.backward_plan(wanted)
        if any(name not in kept for name in self.training_plan(wanted).saved):
            *_, kept = self.forward_keeping(call, given, kept, wanted)
        buffers = {**inputs_of(call, given), **kept, OUT: out, LSE: lse, DO: do, DLSE: dlse}
        self.executor.run(plan, call, buffers)
        return {name: buffers[f"d {name}"] for name in wanted}

    def attends(self, call: Call, given: Mapping[str, Any]) -> tuple[list[tuple[Attend, Call]], dict[str, Any]]:
        """The attentions of a forward, each with the call that it gets, and every buffer that was made for them. None runs."""
        buffers = inputs_of(call, given)
        with torch.no_grad():
            return self.executor.look(self.forward_plan, call, buffers), buffers


def tensors_of(call: Call, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The call's tensors that could have a gradient, by buffer."""
    found = {"q": call.q, "k": call.k, "v": call.v}
    for values in (call.captures, given):
        if values:
            found |= {n: x for n, x in values.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return found
