"""attngen in the models of transformers.

    import attngen.integrations.transformers
    attngen.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attngen")

Every mask of the library is traced and never made for all pairs (`masks`); sinks, soft-caps, position biases and dropout become parts
of the spec (`forms`).
"""

from __future__ import annotations

from collections.abc import Iterable

from attngen.errors import InputError
from attngen.runtime.attention import BACKENDS

OLDEST = "5.24"
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "|", "/")  # names that transformers reads something into


def register(name: str = "attngen", *, backend: str = "auto", ignore: Iterable[str] = ()) -> None:
    """Make `attn_implementation="attngen"` known to transformers: for `from_pretrained`, a config, `model.set_attn_implementation`.

    name: another name for it. backend: as in `ag.compile`. ignore: names of arguments that models pass to attention and that change
    nothing there; what is neither known nor named here is an error at the call. Calling it again replaces what the name stands for.
    Raises InputError without transformers, or with one that is too old.
    """
    fix = f'pip install "transformers>={OLDEST}"'
    try:
        import transformers
        from packaging.version import Version
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise InputError("transformers", f"version {OLDEST} or later", f"none: {error}", fix) from error
    if Version(transformers.__version__) < Version(OLDEST):
        raise InputError("transformers", f"version {OLDEST} or later", transformers.__version__, fix)
    if not name or any(part in name for part in _TAKEN):
        raise InputError(
            "name", f"one without {', '.join(_TAKEN)}, which transformers reads something into", repr(name)
        )
    if backend not in BACKENDS:
        raise InputError("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    from attngen.integrations.transformers.attention import attention_function
    from attngen.integrations.transformers.continuous import allow
    from attngen.integrations.transformers.masks import make_mask

    AttentionInterface.register(name, attention_function(backend, frozenset(ignore)))
    AttentionMaskInterface.register(name, make_mask)
    allow(name)
