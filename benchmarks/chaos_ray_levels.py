"""Disturbed runs on a Ray of their own: whole runs, calls between Ray's processes that fail, nodes that go."""

from __future__ import annotations

import json
import random

import chaos_runs
from chaos_faults import Fault, Fuses, draw
from chaos_levels import Chaos, Outcome

from sae_ray.config import RunConfig

RUN_KINDS = {"producer killed": 4.0, "lease runs out": 1.0, "rank killed": 4.0, "controller killed": 1.0}
RUN_LIMIT_S = 3000.0  # a machine that does much else at a higher priority
FAILING = {
    "CoreWorkerService.grpc_client.PushTask": "num_lower_bound_resp_failures",
    "CoreWorkerService.grpc_client.GetObjectStatus": "num_lower_bound_req_failures",
    "NodeManagerService.grpc_client.RequestWorkerLease": "num_lower_bound_req_failures",
    "NodeManagerService.grpc_client.PinObjectIDs": "num_lower_bound_req_failures",
}


class ChaosOnRay(Chaos):
    """The levels that start Ray, beside those that do not."""

    def on_ray(
        self,
        config: RunConfig,
        plan: list[Fault],
        environment: dict[str, str] | None = None,
        nodes: int = 1,
    ) -> Outcome:
        """A whole run on a Ray of its own; with several nodes, those of the plan's gates are taken away.

        Args:
            environment: of Ray's processes and the driver; with one, the plan's faults are what it says.
        """
        reference = self._reference(config.trainer.tp)
        fuses = Fuses.lay(config.run_dir / "chaos", plan)
        with chaos_runs.ray_nodes(nodes, environment) as ray_:
            for fault in plan if environment else ():
                fuses.note(fault.id)
            driver = chaos_runs.Driver(chaos_runs.at(config, ray_), self.out, environment)
            try:
                if nodes > 1:
                    chaos_runs.take_nodes_away(driver, ray_, plan, RUN_LIMIT_S)
                driver.finish(RUN_LIMIT_S)
            finally:
                driver.end()
        return self._outcome(config, plan, reference=reference)

    def _draw_run(self, name: str, seed: int) -> Outcome:
        config = self.world.config(name)
        plan = draw(seed, 10, config.total_steps, self.world.blocks(config), config.trainer.tp, RUN_KINDS)
        return self.on_ray(config, plan)

    def _draw_rpc(self, name: str, seed: int) -> Outcome:
        rng = random.Random(seed)
        return self.on_ray(self.world.config(name), *rpc_faults(seed, rng.choice(list(FAILING)), rng.choice((20, 100))))

    def _draw_nodes(self, name: str, seed: int) -> Outcome:
        rng, config = random.Random(seed), self.world.config(name, activations={"lease_timeout_s": 300})
        gates = sorted(rng.sample(range(3, self.world.blocks(config) - 2), 2))
        plan = [
            Fault(
                f"{seed}-n{number}", rng.choice(("node gone", "node drained, then gone")), "at a gate", block,
                rank=rng.randrange(2), amount=rng.uniform(0, 3),
            )
            for number, block in enumerate(gates)
        ]  # fmt: skip
        return self.on_ray(config, plan, nodes=2)

    # -- the undisturbed run ----------------------------------------------------------------------------

    def _undisturbed(self, config: RunConfig) -> None:
        if config.trainer.tp == 1:
            super()._undisturbed(config)
            return
        Fuses.lay(config.run_dir / "chaos", [])
        with chaos_runs.ray_nodes(1) as ray_:
            driver = chaos_runs.Driver(chaos_runs.at(config, ray_), self.out)
            try:
                driver.finish(RUN_LIMIT_S)
            finally:
                driver.end()


def rpc_faults(seed: int, method: str, late_ms: int) -> tuple[list[Fault], dict[str, str]]:
    """(plan, environment): each process's first two calls of `method` fail, and PushTask comes late."""
    environment = {
        "RAY_testing_rpc_failure": json.dumps({method: {"num_failures": 2, FAILING[method]: 2}}),
        "RAY_testing_asio_delay_us": f"CoreWorkerService.grpc_server.PushTask=0:{late_ms * 1000}",
    }
    plan = [
        Fault(f"{seed}-rpc", f"RPC fails: {method.rsplit('.', 1)[1]}", "first calls of each process", 0),
        Fault(f"{seed}-late", f"RPC late by up to {late_ms} ms", "every PushTask", 0),
    ]
    return plan, environment
