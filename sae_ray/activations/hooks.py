"""Where a hook site lies in a transformer, whatever the family calls its modules.

A point is the output or the input of one module. The same point serves the truncated model that produces
activations and the whole model into which a reconstruction is spliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_ray.config import HookConfig
from sae_ray.errors import UserError

# Dotted paths of the layer list, tried in turn: llama and its many relatives, GPT-2, GPT-NeoX and Pythia.
_LAYER_PATHS = (
    "model.layers",
    "layers",
    "model.language_model.layers",
    "language_model.layers",
    "transformer.h",
    "h",
    "gpt_neox.layers",
)
_ATTENTION_NAMES = ("self_attn", "attention", "attn")
_MLP_NAMES = ("mlp", "feed_forward")
# The norm that reads the residual stream behind attention; Gemma 2 and 3 have both of the first two.
_MIDDLE_NORM_NAMES = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


class HookPoint(NamedTuple):
    module: nn.Module
    reads_input: bool
    """True: the value is the module's first argument; False: it is (the first of) its output."""


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer's layer list.

    Raises:
        UserError: a module layout that is not known here.
    """
    for path in _LAYER_PATHS:
        node: Any = model
        for name in path.split("."):
            node = getattr(node, name, None)
        if isinstance(node, nn.ModuleList):
            return node
    raise UserError(
        f"model.name: {type(model).__name__} keeps its layers in none of {', '.join(_LAYER_PATHS)}, "
        "so its activations cannot be hooked"
    )


def hook_point(model: nn.Module, hook: HookConfig) -> HookPoint:
    """The module that `hook` means. `resid_pre` of layer i is what layer i-1 puts out.

    Raises:
        UserError: the model's layers have no such point, or their modules are named in a way not known here.
    """
    layers = layers_of(model)
    if hook.site == "resid_pre":
        return HookPoint(layers[0], True) if hook.layer == 0 else HookPoint(layers[hook.layer - 1], False)
    layer = layers[hook.layer]
    if hook.site == "resid_post":
        return HookPoint(layer, False)
    # Where attention and MLP read the same input (GPT-NeoX has this switch), nothing lies between them.
    if hook.site == "resid_mid" and getattr(layer, "use_parallel_residual", False):
        raise UserError(f"hook.site = resid_mid: {type(layer).__name__} runs attention and MLP side by side")
    names = {"attn_out": _ATTENTION_NAMES, "resid_mid": _MIDDLE_NORM_NAMES}.get(hook.site, _MLP_NAMES)
    for name in names:
        if isinstance(module := getattr(layer, name, None), nn.Module):
            return HookPoint(module, hook.site in ("resid_mid", "mlp_in"))
    raise UserError(f"hook.site = {hook.site}: {type(layer).__name__} has none of {', '.join(names)}")


@contextmanager
def edited(point: HookPoint, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `edit(x_BSD)` sees every value at `point`; what it returns, if not None, replaces it."""

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = edit(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = edit(first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if point.reads_input:
        handle = point.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = point.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):
    """The last value is caught and nothing behind it is wanted."""


def run_until(points: Mapping[str, HookPoint], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Call `forward` once and return the values at `points`, computing nothing past the last one."""
    caught: dict[str, Tensor] = {}

    def catcher(name: str) -> Callable[[Tensor], None]:
        def catch(x: Tensor) -> None:
            last = len(caught) + 1 == len(points)
            # Some layers add in place to what they were given, or have given.
            caught[name] = x if last else x.clone()
            if last:
                raise _Reached

        return catch

    with ExitStack() as stack:
        for name, point in points.items():
            stack.enter_context(edited(point, catcher(name)))
        try:
            forward()
        except _Reached:
            return {name: caught[name] for name in points}
    missed = [name for name in points if name not in caught]
    raise RuntimeError(f"the forward pass never reached {', '.join(missed)}")


def native_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
