"""attngen in SGLang: installed beside it, `--attention-backend attngen` computes every layer's attention with attngen.

The entry point `sglang.srt.plugins` calls `register`. What SGLang makes of it is in `backend`, which loads SGLang when it is asked for.
"""

from __future__ import annotations

from typing import Any

from attngen.integrations.interface import require_names

NAME = "attngen"
_CHOICES, _REGISTRY = "sglang.srt.arg_groups.choices", "sglang.srt.layers.attention.attention_registry"


def register() -> None:
    """Make attngen known to SGLang: `sglang serve --attention-backend attngen`. Calling it again changes nothing.

    Raises InputError without SGLang, and for a version whose interface is another.
    """
    choices = ("ATTENTION_BACKEND_CHOICES", "add_attention_backend_choices")
    require_names("sglang", {_CHOICES: choices, _REGISTRY: ("register_attention_backend",)})
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_create)


def _create(runner: Any) -> Any:
    """What SGLang calls, with its ModelRunner, once attngen is chosen."""
    from attngen.integrations.sglang.backend import Backend

    return Backend(runner)
