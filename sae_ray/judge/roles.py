"""The judges of one run: `judge` is the scorer, `judges` names those that differ from it, and which keys fit together.

Pure and cheap to import: configs are checked with it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from sae_ray.network import is_loopback

if TYPE_CHECKING:
    from sae_ray.config import JudgeConfig, RunConfig

Role = Literal["scorer", "explainer", "heldout"]
SCORER: Role = "scorer"
ROLES: tuple[Role, ...] = get_args(Role)
# Keys that one caller decides for itself: judges that differ in nothing else are one application.
_CALLERS_OWN = {
    *("mode", "adapter", "deadline_s", "max_attempts", "max_in_flight", "calibration", "context_tokens"),
    "trust_network",
}
# Texts are cut once for all judges of a run.
_SHARED = ("context_tokens",)
# Engine arguments that this package decides, and the key of `judge` that does it.
DECIDED = {
    "model": "model",
    "served_model_name": "model",
    "max_model_len": "max_model_len",
    "tensor_parallel_size": "tensor_parallel",
    "trust_remote_code": "trust_remote_code",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_memory_bytes": "kv_cache_gb",
    "enable_lora": "lora",
    "lora_target_modules": "lora",
}
# Those that a verdict's reading and an engine's timing rest on; no key changes them.
FIXED = (
    *("enable_prefix_caching", "block_size", "distributed_executor_backend"),
    *("disable_log_stats", "enable_logging_iteration_details"),
)

# Those that hold a secret, and the environment variable for it: a config is written down.
SECRETS = {"hf_token": "HF_TOKEN"}


def judges_of(run: RunConfig) -> dict[Role, JudgeConfig]:
    """Every judge that the run names, by role. An explainer that is not named is the scorer itself.

    A held-out judge that is not named does not exist: the scorer cannot hold itself out.

    Raises:
        ValueError: a role, key or value is unknown or refused; names it as `judges.explainer.model`.
    """
    named: dict[Role, JudgeConfig] = {}
    for role, keys in run.judges.items():
        where = f"judges.{role}"
        if role not in ROLES or role == SCORER:
            from sae_ray.config_file import unknown_key

            hint = "the section `judge` is the scorer" if role == SCORER else unknown_key(role, list(ROLES[1:]))
            raise ValueError(f"{where}: {hint}")
        _check_keys(keys, type(run.judge), where)
        for key in _SHARED:
            if key in keys:
                raise ValueError(f"{where}.{key}: is the run's own, judge.{key}: all its judges read the same texts")
        _check_source(run.judge, keys, where)
        named[role] = _merged(run.judge, keys, role)
    return {SCORER: run.judge, "explainer": named.pop("explainer", run.judge), **named}


def deployed(cfg: JudgeConfig) -> dict[str, Any]:
    """What decides an application; equal for two judges that can share one."""
    return cfg.model_dump(mode="json", exclude=_CALLERS_OWN)


def check_judge(cfg: JudgeConfig) -> None:
    """Refuses a judge section whose keys do not fit together.

    Raises:
        ValueError: in words for the user. Never quotes `api_key_env`: it may be the key, pasted into the wrong place.
    """
    if cfg.endpoint is not None:
        if cfg.app is not None:
            raise ValueError("judge.endpoint and judge.app both name a judge that already serves: set one of them")
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", cfg.endpoint):
            raise ValueError(
                "judge.endpoint is no base URL: expected http://host:port/v1 or https://host/v1, without a key, "
                "a user name or a query"
            )
    for key, value in (("endpoint_model", cfg.endpoint_model), ("api_key_env", cfg.api_key_env)):
        if value is not None and cfg.endpoint is None:
            raise ValueError(f"judge.{key} is for judge.endpoint, which is not set")
    if cfg.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", cfg.api_key_env):
        # Small letters are refused because keys have them: hf_..., gsk_...
        raise ValueError(
            "judge.api_key_env is no name of an environment variable (A-Z, 0-9 and _); it must not be the key itself"
        )
    if cfg.api_key_env is not None and cfg.endpoint is not None and not cfg.trust_network:
        parts = urlsplit(cfg.endpoint)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ValueError(
                f"judge.endpoint {cfg.endpoint}: would send the key of judge.api_key_env unencrypted to another "
                "machine; use https://, or set judge.trust_network: true if nobody else can listen"
            )
    if cfg.s3_mirror is not None and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", cfg.s3_mirror):
        raise ValueError(f"judge.s3_mirror {cfg.s3_mirror!r}: expected s3://bucket/prefix")
    if cfg.adapter is not None and cfg.adapter not in cfg.lora:
        known = ", ".join(cfg.lora) or "none"
        raise ValueError(f"judge.adapter {cfg.adapter!r} is not among judge.lora ({known})")
    for name, path in cfg.lora.items():
        if "://" in path:
            raise ValueError(f"judge.lora.{name} {path!r}: expected a folder that replicas see, or a Hugging Face id")
    for key in cfg.engine_kwargs:
        if key in SECRETS:
            raise ValueError(
                f"judge.engine_kwargs.{key}: would stand in config.yaml; set {SECRETS[key]} where replicas run"
            )
        if key in DECIDED:
            raise ValueError(f"judge.engine_kwargs.{key}: is decided by judge.{DECIDED[key]}")
        if key in FIXED:
            raise ValueError(
                f"judge.engine_kwargs.{key}: is fixed, because verdicts are read and engines timed with it"
            )


def _check_keys(keys: dict[str, Any], section: type[BaseModel], where: str) -> None:
    """The `judges` mapping is untyped for pydantic, so its keys are checked here, nested sections included."""
    from sae_ray.config_file import unknown_key

    for key, value in keys.items():
        if key not in section.model_fields:
            raise ValueError(f"{where}.{key}: {unknown_key(str(key), sorted(section.model_fields))}")
        inner = section.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _check_keys(value, inner, f"{where}.{key}")


def _check_source(base: JudgeConfig, keys: dict[str, Any], where: str) -> None:
    """A model that is named beside an inherited server would silently not be asked."""
    for source in ("app", "endpoint"):
        for key in ("model", "s3_mirror"):
            other = "app" if source == "endpoint" else "endpoint"
            named = source in keys or keys.get(other) is not None
            if getattr(base, source) is not None and key in keys and not named:
                raise ValueError(f"{where}.{key}: judge.{source} would answer instead: set {where}.{source}, or null")


def _merged(base: JudgeConfig, keys: dict[str, Any], role: Role) -> JudgeConfig:
    from sae_ray.config_file import explain

    values = base.model_dump()
    for key, value in keys.items():
        nested = isinstance(value, dict) and isinstance(getattr(base, key), BaseModel)
        values[key] = values[key] | value if nested else value
    # What only makes sense with a server goes with it.
    if values["endpoint"] is None and base.endpoint is not None:
        for key in ("endpoint_model", "api_key_env"):
            values[key] = keys.get(key)
    if values["app"] is not None and "app" in keys and "endpoint" not in keys:
        values["endpoint"] = values["endpoint_model"] = values["api_key_env"] = None
    if values["endpoint"] is not None and "endpoint" in keys and "app" not in keys:
        values["app"] = None
    # Adapters and a mirror are one model's.
    if any(keys.get(key) not in (None, getattr(base, key)) for key in ("model", "s3_mirror", "endpoint", "app")):
        values |= {"lora": keys.get("lora", {}), "adapter": keys.get("adapter")}
        if keys.get("model") not in (None, base.model):
            values["s3_mirror"] = keys.get("s3_mirror")
    try:
        return type(base).model_validate(values)
    except ValidationError as error:
        # A section's own check names itself `judge.`; what is wrong stands under `judges` here.
        said = explain(error, ("judges", role)).replace("judges.judge.", f"judges.{role}.")
        raise ValueError(said.replace(" judge.", f" judges.{role}.")) from None
