"""The judge pool of one run: deployed without blocking, watched, and taken down with nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.adapters import fitting_rank
from sae_ray.judge.roles import SCORER, Role
from sae_ray.storage import aws_environment

_MODEL_ID = "judge"
# Ray Serve LLM names a deployment `<server class>:<model id>`.
_DEPLOYMENT = f"JudgeServer:{_MODEL_ID}"
_QUIET = {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False}
_GIB = 1 << 30
# vLLM's CPU backend caches prefixes in blocks of 128 tokens unless told otherwise; judged texts are shorter.
# 16 is refused.
_CPU_BLOCK_TOKENS = 32
_MAX_SEQUENCES = 64
_CPU_BATCH_TOKENS = 4096
# Quantisations whose files vLLM reads with a loader of their own.
_OWN_LOADERS = ("bitsandbytes", "gguf")
# How a replica learns those of its settings that Ray Serve LLM has no place for.
SETTINGS_VARIABLE = "SAE_RAY_JUDGE_SETTINGS"


def app_name(run_name: str, role: Role = SCORER) -> str:
    # The role first: no run's name can make its scorer's application another run's explainer.
    kind = "judge" if role == SCORER else role
    return f"sae-ray-{kind}-" + re.sub(r"[^A-Za-z0-9_-]", "-", run_name)


@dataclass
class JudgeApp:
    """A Serve application of LLM replicas: this run's own, or the shared one that `judge.app` names.

    Args:
        cfg: the run's judge section.
        run_name: makes an own application's name unique on a shared cluster.
        keep_serve: leave Serve itself running after the application is deleted; for a Ray that ends with the run.
        role: which of the run's judges it is.
        build: makes the Serve application of `cfg`; None: `build_app`.
    """

    cfg: JudgeConfig
    run_name: str
    keep_serve: bool = False
    role: Role = SCORER
    build: Callable[[JudgeConfig], Any] | None = None
    _deploying: Any = field(default=None, init=False)
    _owns_serve: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return self.cfg.app or app_name(self.run_name, self.role)

    @property
    def deploying(self) -> Any:
        """ObjectRef of the task that submits the application; None before `start`."""
        return self._deploying

    def start(self, after: Any = None, owns_serve: bool | None = None) -> None:
        """Ask for the deployment and return at once; training goes on while replicas load. Idempotent.

        A task deploys, not this process: it needs vLLM, which a driver on a laptop need not have.

        Args:
            after: another application's `deploying`, which must not start Serve at the same time.
            owns_serve: whether Serve ends with this application; None: if it does not run yet.
        """
        if self._deploying is not None or self.cfg.app is not None:
            return
        self._owns_serve = not serve_is_up() if owns_serve is None else owns_serve
        # What a replica shall have of the driver's environment, the deploying task must have: it passes it on.
        passed = ("HF_", "VLLM_", "AWS_", "SAE_RAY_CACHE")
        env = {"env_vars": {k: v for k, v in replica_env(self.cfg).items() if k.startswith(passed)}}
        self._deploying = _deploy.options(num_cpus=0, runtime_env=env).remote(
            self.cfg, self.name, [] if after is None else [after], self.build or build_app
        )

    def ready(self, timeout: float) -> bool:
        """Wait until a replica serves (or until the application may scale from zero).

        Returns:
            Whether it serves within `timeout` seconds; ask again to go on waiting.
        Raises:
            UserError: the deployment failed, with the reason that Serve gives.
        """
        deadline = time.monotonic() + timeout
        while True:
            status = self.status()
            if status["state"] == "RUNNING":
                return True
            # Not UNHEALTHY: that is a dead replica whose successor is starting.
            if status["state"] == "DEPLOY_FAILED":
                raise UserError(f"judge.model {self.cfg.model}: the judge did not start: {status['message']}")
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(0.5, max(0.01, deadline - time.monotonic())))

    def handle(self) -> Any:
        """A DeploymentHandle for `JudgeClient`; it may be sent to other actors."""
        from ray import serve

        return serve.get_deployment_handle(_DEPLOYMENT, self.name)

    def status(self) -> dict[str, Any]:
        """`state` (NOT_STARTED, DEPLOYING, RUNNING, ...), `running` and `starting` replicas, `message`."""
        from ray import serve

        if self._deploying is not None:
            done, _ = ray.wait([self._deploying], timeout=0)
            if done:
                try:
                    ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    cause = str(error.cause).strip() or repr(error.cause)
                    return _status("DEPLOY_FAILED", message=cause.splitlines()[-1])
        if not serve_is_up():
            return _status("NOT_STARTED" if self._deploying is None else "DEPLOYING")
        app = serve.status().applications.get(self.name)
        if app is None:
            return _status("NOT_STARTED" if self._deploying is None else "DEPLOYING")
        deployment = app.deployments.get(_DEPLOYMENT)
        # Typed as an enum; a status that crossed processes has plain strings.
        replicas = {str(getattr(k, "value", k)): n for k, n in deployment.replica_states.items()} if deployment else {}
        message = " ".join((app.message or (deployment.message if deployment else "")).split())
        starting = sum(replicas.get(each, 0) for each in ("STARTING", "RECOVERING", "PENDING_MIGRATION"))
        return _status(str(app.status.value), replicas.get("RUNNING", 0), starting, message)

    def shutdown(self, timeout: float = 60) -> None:
        """Delete the application, and Serve with it where this run started it. Safe to call twice, from `finally`.

        A shared application stays.
        """
        from ray import serve

        if not ray.is_initialized() or self.cfg.app is not None:
            return
        if self._deploying is not None:
            # Deleting what is still being submitted would leave the application behind.
            with contextlib.suppress(Exception):
                ray.get(self._deploying, timeout=timeout)
            self._deploying = None
        if not serve_is_up():
            return
        if self.name in serve.status().applications:
            serve.delete(self.name)
        if self._owns_serve and not self.keep_serve and not serve.status().applications:
            serve.shutdown()
        self._owns_serve = False


def _status(state: str, running: int = 0, starting: int = 0, message: str = "") -> dict[str, Any]:
    return {"state": state, "running": running, "starting": starting, "message": message}


def serve_is_up() -> bool:
    """Whether a Serve controller runs; asking `serve.status()` itself would start one."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    with contextlib.suppress(ValueError):
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return True
    return False


@ray.remote(max_retries=0)
def _deploy(cfg: JudgeConfig, name: str, after: list[Any], build: Callable[[JudgeConfig], Any]) -> None:
    """Submit the application; does not wait for replicas, only for the tasks `after`, however they end."""
    from ray import serve

    if after:
        ray.wait(after)

    # No HTTP: judges are called by handle only, and a proxy's start can time out on a busy machine.
    for chatty in ("ray.serve", "ray.llm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    serve._run(build(cfg), name=name, route_prefix=None, logging_config=_QUIET, _blocking=False)


def build_app(cfg: JudgeConfig) -> Any:
    """The Serve application for a judge config; needs vLLM."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from sae_ray.judge.server import JudgeServer

    return build_llm_deployment(LLMConfig(**llm_config(cfg)), deployment_cls=JudgeServer)


def llm_config(cfg: JudgeConfig) -> dict[str, Any]:
    """Arguments of `LLMConfig`: pure, so that what a replica asks for can be tested without one."""
    return {
        "model_loading_config": model_loading(cfg),
        "engine_kwargs": engine_kwargs(cfg),
        "accelerator_config": {"kind": "gpu" if cfg.gpus else "cpu"},
        "placement_group_config": placement(cfg),
        "runtime_env": {"env_vars": replica_env(cfg)},
        "log_engine_metrics": False,
        "callback_config": {"callback_class": "sae_ray.judge.server.LocalModel"},
        "deployment_config": deployment_options(cfg),
    }


def model_loading(cfg: JudgeConfig) -> dict[str, Any]:
    """Where replicas get the model: the Hub, a folder, or a bucket that they copy to their own disk."""
    if cfg.s3_mirror is None:
        return {"model_id": _MODEL_ID, "model_source": cfg.model}
    # A node keeps its copy under the model's id, so two mirrors must not have the same.
    return {"model_id": mirror_id(cfg.s3_mirror), "model_source": {"bucket_uri": cfg.s3_mirror.rstrip("/")}}


def mirror_id(uri: str) -> str:
    digest = hashlib.blake2b(uri.rstrip("/").encode(), digest_size=6).hexdigest()
    return f"{_MODEL_ID}-{digest}"


def check_mirrored(uri: str, folder: str) -> None:
    """Refuses what came out of a bucket if it is no model; Ray Serve LLM only logs that a download failed.

    Raises:
        UserError: no config.json and safetensors in `folder`, this machine's copy.
    """
    found = Path(folder)
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not any(found.glob(pattern))]
    if missing:
        raise UserError(
            f"judge.s3_mirror {uri}: no {' and no '.join(missing)} came from there; is the prefix that of the model's "
            "folder, and have the replica's machine credentials, AWS_ENDPOINT_URL and AWS_REGION for it?"
        )


def deployment_options(cfg: JudgeConfig) -> dict[str, Any]:
    scaling = cfg.autoscaling
    return {
        "name": _MODEL_ID,
        # Ray Serve LLM's own defaults for the next two are 1e9: no back-pressure and no autoscaling, ever.
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "initial_replicas": scaling.initial_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "upscaling_factor": scaling.upscaling_factor,
        },
        "ray_actor_options": {"num_cpus": cfg.cpus},
        # One for all bundles. The replica's actor is in the first one, and goes where that goes.
        **({"placement_group_bundle_label_selector": [dict(cfg.label_selector)]} if cfg.label_selector else {}),
        # A busy CPU engine may be slow to say that it is well; a wrong restart costs a whole start-up.
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 10,
        # A model that cannot be loaded fails the same way each time; Serve would try 20 times.
        "max_constructor_retry_count": 3,
        "request_router_config": {
            # One text's calls go to one replica, which has its KV; the next on the ring takes over when it is full.
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            "request_router_kwargs": {"num_fallback_replicas": scaling.max_replicas},
        },
    }


def placement(cfg: JudgeConfig) -> dict[str, Any]:
    """Bundles of one replica. Ray Serve LLM adds the replica actor's own CPUs to the first one.

    On CPU the engine's processes are the replica's children, so they ask for nothing more (the default would reserve
    one more CPU each); on GPU there is one bundle per tensor-parallel worker. Custom resources are each bundle's, not
    the actor's: Ray Serve LLM would ask for those of the actor once more.
    """
    if not cfg.gpus:
        return {"bundles": [{"CPU": 0, **cfg.resources}], "strategy": "STRICT_PACK"}
    return {"bundle_per_worker": {"GPU": cfg.gpus, **cfg.resources}, "strategy": "PACK"}


def engine_kwargs(cfg: JudgeConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "max_model_len": cfg.max_model_len,
        "tensor_parallel_size": cfg.tensor_parallel,
        "trust_remote_code": cfg.trust_remote_code,
        "enable_prefix_caching": True,
        "max_num_seqs": _MAX_SEQUENCES,
        # How long each engine step took comes with vLLM's statistics; server.py takes that and drops the rest.
        "disable_log_stats": False,
        "enable_logging_iteration_details": True,
        # On CPU "auto" is settled by the replica (server.py): the deploying machine may be of another kind.
        "dtype": cfg.dtype,
    }
    if not cfg.gpus:
        kwargs |= {
            "block_size": _CPU_BLOCK_TOKENS,
            "kv_cache_memory_bytes": int(cfg.kv_cache_gb * _GIB),
            # Compiling takes longer than a small run's whole judging.
            "enforce_eager": True,
            # Where a prompt is cut in two, vLLM winds a seeded request's generator back. CPU generators cannot, and the
            # engine dies of it. So prompts are prefilled whole.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, cfg.max_model_len),
        }
    if cfg.quantization not in _OWN_LOADERS:
        # vLLM would fall back on pickles, which may run anything.
        kwargs["load_format"] = "safetensors"
    if cfg.quantization is not None:
        kwargs["quantization"] = cfg.quantization
    if cfg.lora:
        # vLLM's default rank is 16, and it refuses an adapter of a higher one. Of adapters that are not here but where
        # the replica is, it finds out itself (adapters.py), and which modules they change.
        kwargs |= {"enable_lora": True, "max_loras": len(cfg.lora), "max_lora_rank": fitting_rank(cfg.lora)}
    # Refused by the config where they would contradict what is above.
    return kwargs | cfg.engine_kwargs


def _passed_on(cfg: JudgeConfig) -> dict[str, str]:
    """The driver's settings that decide what a replica loads; of S3, where it is but not the keys to it."""
    names = ("HF_HUB_OFFLINE", "HF_HOME", "SAE_RAY_CACHE")
    mirror = aws_environment() if cfg.s3_mirror is not None else {}
    return {key: os.environ[key] for key in names if key in os.environ} | mirror


def replica_env(cfg: JudgeConfig) -> dict[str, str]:
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "RAYLLM_ENGINE_START_TIMEOUT_S": str(int(cfg.start_timeout_s)),
        SETTINGS_VARIABLE: json.dumps({"stall_timeout_s": cfg.stall_timeout_s, "lora": cfg.lora}),
        # Ray sets CUDA_VISIBLE_DEVICES per actor; HF settings must agree with the driver's.
        **_passed_on(cfg),
    }
    if not cfg.gpus:
        # vLLM would bind one thread to each core it may use; a replica shares its machine with the run.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cfg.threads)}
    return env
