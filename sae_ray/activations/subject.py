"""The subject language model, cut off after the last hook point: later layers and the head are never built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from sae_ray.activations.hooks import hook_point, native_dtype, run_until
from sae_ray.config import HookConfig, ModelConfig
from sae_ray.embedded import resolve_model
from sae_ray.errors import UserError


class SubjectLM:
    """Activations of some hook points, in one forward pass.

    Args:
        device: where to run; None takes CUDA if there is one.
    Raises:
        UserError: the model or a layer does not exist, or the model's modules are laid out in a way
            that is not known.
    """

    def __init__(
        self, model_cfg: ModelConfig, hooks: Sequence[HookConfig], device: str | torch.device | None = None
    ) -> None:
        self.device = _device(device)
        self.dtype = native_dtype(model_cfg.dtype, self.device)
        config = read_model_config(model_cfg)
        self.n_layers = check_hooks(model_cfg, hooks)
        # Every site that there is lies on the residual stream, or reads or writes it.
        self.widths: dict[str, int] = {hook.name: _text(config).hidden_size for hook in hooks}
        # The input of layer 0 needs a layer to hook; it is never run.
        _truncate(config, max(1, *(hook.layer + (hook.site != "resid_pre") for hook in hooks)))
        self._model = _load(AutoModel, model_cfg, config, self.dtype, self.device)
        self._points = {hook.name: hook_point(self._model, hook) for hook in hooks}

    @property
    def layers_built(self) -> int:
        return _text(self._model.config).num_hidden_layers

    @torch.inference_mode()
    def forward(self, tokens_SL: Tensor) -> dict[str, Tensor]:
        """By hook name, activations [S, L, D] in the model's dtype for token ids [S, L] (any integer; pad < 0).

        Padding must be on the right: causal attention then keeps it from all real positions without a mask.
        """
        ids_SL = tokens_SL.to(self.device, torch.long).clamp(min=0)
        return run_until(self._points, lambda: self._model(input_ids=ids_SL, use_cache=False))


def load_tokenizer(model_cfg: ModelConfig) -> Any:
    """The model's fast tokenizer.

    Raises:
        UserError: it is missing or has no fast (Rust) implementation.
    """
    with _loading(model_cfg):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(model_cfg.name), trust_remote_code=model_cfg.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(f"model.name = {model_cfg.name}: has no fast tokenizer")
    return tokenizer


def load_full_model(model_cfg: ModelConfig, dtype: torch.dtype, device: str | torch.device | None) -> Any:
    """The whole causal LM, in eval mode, for CE losses."""
    return _load(AutoModelForCausalLM, model_cfg, read_model_config(model_cfg), dtype, _device(device))


def read_model_config(model_cfg: ModelConfig) -> Any:
    """The Hugging Face config of `model.name`, without its weights."""
    with _loading(model_cfg):
        return AutoConfig.from_pretrained(resolve_model(model_cfg.name), trust_remote_code=model_cfg.trust_remote_code)


def check_hooks(model_cfg: ModelConfig, hooks: Sequence[HookConfig]) -> int:
    """Refuse layers that the model does not have, reading only its config. Returns its number of layers.

    Raises:
        UserError: no such model, or no such layer.
    """
    n_layers = getattr(_text(read_model_config(model_cfg)), "num_hidden_layers", None)
    if n_layers is None:
        raise UserError(f"model.name = {model_cfg.name}: its config has no num_hidden_layers")
    for hook in hooks:
        if hook.layer >= n_layers:
            raise UserError(f"hook.layer = {hook.layer}: {model_cfg.name} has {n_layers} layers (0 to {n_layers - 1})")
    return n_layers


def _text(config: Any) -> Any:
    """The part of a (possibly multimodal) config that describes the language model."""
    return config.get_text_config()


def _truncate(config: Any, n_layers: int) -> None:
    text = _text(config)
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]


def _load(loader: Any, model_cfg: ModelConfig, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    with _loading(model_cfg):
        model, info = loader.from_pretrained(
            resolve_model(model_cfg.name),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model_cfg.trust_remote_code,
            output_loading_info=True,
        )
    # Warnings are off (the cut layers' keys are "unexpected"), so what matters is checked by hand.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model.name = {model_cfg.name}: the checkpoint lacks {missing[0]} ({len(missing)} in all)")
    return model.to(device).eval()


@contextmanager
def _loading(model_cfg: ModelConfig) -> Iterator[None]:
    """Quiet transformers; what it raises becomes one line that names the model."""
    verbosity = hf_logging.get_verbosity()
    progress = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"model.name = {model_cfg.name}: cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress:
            hf_logging.enable_progress_bar()


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
