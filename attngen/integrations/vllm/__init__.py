"""attngen in vLLM: installed beside it, `--attention-backend CUSTOM` computes every layer's attention with attngen.

The entry point `vllm.general_plugins` calls `plugin`. The classes that vLLM asks for are in `backend`, which loads vLLM; nothing else
here does.
"""

from __future__ import annotations

import warnings

from attngen.errors import AttngenWarning, InputError
from attngen.integrations.interface import require_names

BACKEND = "attngen.integrations.vllm.backend.Backend"
_REGISTRY = "vllm.v1.attention.backends.registry"


def register() -> None:
    """Make attngen vLLM's backend CUSTOM: `vllm serve MODEL --attention-backend CUSTOM`. Calling it again changes nothing.

    Raises InputError without vLLM, for a version whose interface is another, or if CUSTOM is somebody else's.
    """
    require_names("vllm", {_REGISTRY: ("AttentionBackendEnum", "register_backend")})
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        fix = "name the plugins to load, VLLM_PLUGINS=attngen"
        raise InputError("--attention-backend CUSTOM", "a name that is free", f"one for {custom.get_path()}", fix)
    register_backend(custom, BACKEND)


def plugin() -> None:
    """`register`, for vLLM to call at every start, whoever's attention it is going to use: what is wrong is a warning. CUSTOM then
    stays unknown, and vLLM refuses it by name.
    """
    try:
        register()
    except InputError as error:
        warnings.warn(f"attngen is no attention backend of this vLLM: {error}", AttngenWarning, stacklevel=2)
