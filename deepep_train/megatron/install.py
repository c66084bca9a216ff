"""Makes stock Megatron-Core know a flex backend of the name "deepep_train"; `uninstall` takes that back.

Megatron has no registry of dispatchers, so two of its functions are replaced by ones that look at the configuration: what
`MoELayer` builds for type "flex", and what its 1F1B schedule frees early, which goes by the backend's name. In
Transformer Engine, experts learn to take rows that were quantized before the wire (quantized_experts.py).
"""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from deepep_train.errors import DeepEPError
from deepep_train.megatron import quantized_experts
from deepep_train.megatron.replacements import Replacements

BACKEND = "deepep_train"
# The fields of a TransformerConfig that say who carries tokens, for whoever compares the two.
DISPATCHERS: dict[str, dict[str, str]] = {
    "alltoall": {"moe_token_dispatcher_type": "alltoall"},
    "deepep_train": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": BACKEND},
}
# Releases whose dispatcher interface this follows; the tests run the newest.
OLDEST, NEWEST = (0, 16), (0, 19)

# Where the schedule's policy lives, by release.
_POLICY_MODULES = ("megatron.core.models.common.utils", "megatron.core.models.gpt.fine_grained_callables")

_replaced = Replacements()  # what builds dispatchers
_policies = Replacements()
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # dispatchers, as long as their layers live


def install() -> None:
    """From now on `TransformerConfig(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep_train")` builds
    `TokenDispatcher` in every `MoELayer` made, those of hybrid and MTP models included. Doing it twice does nothing.

    Raises:
        DeepEPError: without megatron-core, or with a release that this library does not know.
    """
    if _replaced:
        return
    _check_version()
    moe_layer = importlib.import_module("megatron.core.transformer.moe.moe_layer")
    _replaced.put(moe_layer, "MoEFlexTokenDispatcher", _builder(moe_layer.MoEFlexTokenDispatcher))
    for name in _POLICY_MODULES if not _policies else ():
        module = _imported(name)
        if module is not None and "should_free_input" in vars(module):
            _policies.put(module, "should_free_input", _policy(module.should_free_input))
    quantized_experts.install()


def uninstall() -> None:
    """Put Megatron's own functions back. Layers already made keep their dispatchers, and as long as there are any the 1F1B
    schedule keeps what it must not free of theirs; other layers' tensors it treats as before."""
    quantized_experts.uninstall()
    _replaced.take_back()
    if not _made:
        _policies.take_back()


def _check_version() -> None:
    try:
        core = importlib.import_module("megatron.core")
    except ImportError as error:
        raise DeepEPError("deepep_train.megatron needs megatron-core: pip install megatron-core") from error
    text = core.__version__
    major, minor = (int(part) for part in text.split("+")[0].split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise DeepEPError(f"deepep_train.megatron knows megatron-core {known}, this is {text} ({core.__file__})")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:  # of another release
        return None


def _builder(stock: Callable[..., Any]) -> Callable[..., Any]:
    def flex_dispatcher(num_local_experts: int, local_expert_indices: list[int], config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.moe_flex_dispatcher_backend != BACKEND:
            return stock(num_local_experts, local_expert_indices, config, *args, **kwargs)
        from deepep_train.megatron.dispatcher import TokenDispatcher

        made = TokenDispatcher(num_local_experts, local_expert_indices, config, *args, **kwargs)
        _made.add(made)
        return made

    return flex_dispatcher


class _LikeHybridEP:
    """A configuration as it would be with the backend "hybridep": of Megatron's own the one with an identity between what
    dispatch gives and what the experts take, as here, so that neither may be freed.

    And without FP8, under which the schedule frees the experts' input, taking it that every expert saves what it quantized: the
    first and last layers may be in bf16, or single modules, and offloading keeps the input itself. (Rows that crossed in FP8
    take no memory there.)"""

    moe_flex_dispatcher_backend = "hybridep"
    fp8 = fp4 = None

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _policy(stock: Callable[..., bool]) -> Callable[..., bool]:
    signature = inspect.signature(stock)

    def should_free_input(*args: Any, **kwargs: Any) -> bool:
        given = signature.bind(*args, **kwargs)
        config = given.arguments["config"]
        if config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == BACKEND:
            given.arguments["config"] = _LikeHybridEP(config)
        return stock(*given.args, **given.kwargs)

    return should_free_input
