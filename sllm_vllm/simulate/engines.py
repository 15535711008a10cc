"""The nodes and engines of the simulated world: starts, loads, crashes, losses. Owned by ``World``."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial

from sllm_vllm.router.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    NodeReported,
    PrefetchModel,
    ReplicaEnded,
    ReplicaMovable,
    ReplicaReady,
    StartReplica,
    StopReplica,
)
from sllm_vllm.router.core.facts import StartSample, Tier
from sllm_vllm.simulate.hardware import HardwareCluster
from sllm_vllm.simulate.machines import SimulatedNode, SimulatedReplica, Stage, keep
from sllm_vllm.simulate.run import Run

# The virtual clock: planned callbacks, run in the order of time. Owned by ``World``.


class Agenda:
    """Callbacks for the same time run in the order in which they were planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._num_planned = 0

    def at(self, at_s: float, happen: Callable[[], None]) -> None:
        """Plan a callback for a time."""
        self._num_planned += 1
        heapq.heappush(self._planned, (at_s, self._num_planned, happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Plan a callback for ``seconds`` from now."""
        self.at(self.now_s + seconds, happen)

    def step(self, until_s: float) -> bool:
        """Run the next callback; returns False if none is planned by ``until_s``."""
        if not self._planned or self._planned[0][0] > until_s:
            return False
        self.now_s, _, happen = heapq.heappop(self._planned)
        happen()
        return True


NOTICE_S = 0.01
"""Delay between the two ways in which a dead engine is noticed: by its requests, or by its node."""


class SimulatedEngines:
    """Nodes and the replicas on them. ``tell`` sends the policy an event; ``interrupt`` ends what ran on a replica."""

    def __init__(
        self,
        cluster: HardwareCluster,
        agenda: Agenda,
        run: Run,
        *,
        rng: random.Random,
        tell: Callable[[Event], None],
        interrupt: Callable[[SimulatedReplica], None],
    ) -> None:
        self.cluster = cluster
        self.classes = cluster.classes()
        self.nodes: dict[str, SimulatedNode] = {}
        self.replicas: dict[str, SimulatedReplica] = {}
        """All replicas that hold slots."""
        self._agenda = agenda
        self._run = run
        self._rng = rng
        self._tell = tell
        self._interrupt = interrupt
        self._names: set[str] = set()
        """Ids of all replicas ever."""

    # ------------------------------------------------------------------------------------------------------- nodes

    def join(self) -> None:
        """Make the nodes, fill their disks, and announce them."""
        nodes = [SimulatedNode(f"n{number:04}", self.cluster.node) for number in range(self.cluster.num_nodes)]
        self.nodes = {node.id: node for node in nodes}
        self._fill_disks(nodes)
        for node in nodes:
            self._tell(NodeJoined(node.id, node.kind.num_slots, node.kind.is_warm))
            self.report(node)
            self._plan_loss(node)

    def _fill_disks(self, nodes: list[SimulatedNode]) -> None:
        """Put each model on ``on_disk`` nodes, round-robin, as far as their disks have room."""
        num_copies = min(self.cluster.on_disk, len(nodes))
        used = dict.fromkeys(self.nodes, 0)
        for number, (model, kind) in enumerate(self.classes.items()):
            for copy in range(num_copies):
                node = nodes[(number + copy * (len(nodes) // num_copies)) % len(nodes)]
                used[node.id] += kind.nbytes
                if used[node.id] <= node.kind.disk_nbytes:
                    node.disk[model] = kind.nbytes
                if self.cluster.is_in_memory:
                    keep(node.host, node.kind.host_nbytes, model, nbytes=kind.nbytes)

    def report_changes(self) -> None:
        """Send the reports that are due, as agents do when polled."""
        for node in self.nodes.values():
            if node.is_report_due and not node.is_lost:
                self.report(node)

    def report(self, node: SimulatedNode) -> None:
        """Report where a node has models."""
        node.is_report_due = False
        residency = node.residency()
        nbytes = {model: self.classes[model].nbytes for model in residency}
        hops = {tier: node.kind.rate_bps(tier) for tier in Tier}
        self._tell(NodeReported(node.id, node.kind.is_warm, residency, nbytes, hops))

    def _plan_loss(self, node: SimulatedNode) -> None:
        if self.cluster.failures.losses_per_hour:
            seconds = self._rng.expovariate(self.cluster.failures.losses_per_hour / 3600)
            self._agenda.after(seconds, partial(self._lose, node))

    def _lose(self, node: SimulatedNode) -> None:
        self._run.num_losses += 1
        node.is_lost = True
        node.host.clear()
        node.fills = {}
        lost = list(node.replicas.values())
        for replica in lost:
            self._remove(replica)
        noticed = [partial(self._interrupt, replica) for replica in lost]
        self._notice([partial(self._tell, NodeLost(node.id))], noticed)
        self._agenda.after(self.cluster.failures.node_back_s, partial(self._come_back, node))

    def _come_back(self, node: SimulatedNode) -> None:
        node.is_lost, node.load_until_s = False, 0.0
        self._tell(NodeJoined(node.id, node.kind.num_slots, node.kind.is_warm))
        self.report(node)
        self._plan_loss(node)

    def _notice(self, by_node: list[partial[None]], by_requests: list[partial[None]]) -> None:
        """Deliver both notices of a death, in random order."""
        first, second = (by_node, by_requests) if self._rng.random() < 0.5 else (by_requests, by_node)
        for happen in second:
            self._agenda.after(NOTICE_S, happen)
        for happen in first:
            happen()

    # ---------------------------------------------------------------------------------------------------- replicas

    def start(self, order: StartReplica) -> None:
        """Start a process; a node that is gone refuses."""
        node, kind = self.nodes[order.node], self.classes[order.model]
        assert order.replica not in self._names, f"{order.replica} is started twice"
        self._names.add(order.replica)
        if node.is_lost:
            ended = ReplicaEnded(order.replica, "its node is gone", is_fault=True)
            self._agenda.after(NOTICE_S, partial(self._tell, ended))
            return
        assert node.num_free >= kind.accelerators, f"{order.replica} has no {kind.accelerators} free slots on {node.id}"
        replica = SimulatedReplica(order.replica, order.model, kind, node, self._agenda.now_s)
        self.replicas[replica.id] = node.replicas[replica.id] = replica
        self._run.num_starts += 1
        process_s = kind.process_s(node.kind.is_warm) * self.cluster.failures.noise(self._rng)
        if self._rng.random() < self.cluster.failures.start_share:
            self._agenda.after(process_s, partial(self._fail_start, replica))
        else:
            self._agenda.after(process_s, partial(self._load, replica, process_s))

    def _load(self, replica: SimulatedReplica, process_s: float) -> None:
        if replica.stage is not Stage.STARTING:
            return
        node, kind, failures = replica.node, replica.kind, self.cluster.failures
        noise = failures.noise(self._rng)
        tier, begins_s, ends_s = node.queue_load(replica.model, kind, now_s=self._agenda.now_s, noise=noise)
        sample = StartSample(
            model=replica.model,
            node=node.id,
            is_warm=node.kind.is_warm,
            tier=tier,
            nbytes=kind.nbytes,
            process_s=process_s,
            init_s=kind.init_s * failures.noise(self._rng),
            weights_s=ends_s - begins_s,
        )
        self._agenda.at(ends_s, partial(setattr, node, "is_report_due", True))
        self._agenda.at(ends_s + sample.init_s, partial(self._be_ready, replica, sample))

    def _be_ready(self, replica: SimulatedReplica, sample: StartSample) -> None:
        if replica.stage is not Stage.STARTING:
            return
        replica.stage, replica.ready_s = Stage.READY, self._agenda.now_s
        if self.cluster.failures.crashes_per_hour:
            seconds = self._rng.expovariate(self.cluster.failures.crashes_per_hour / 3600)
            self._agenda.after(seconds, partial(self._crash, replica))
        self._tell(ReplicaReady(replica.id, sample))
        if replica.stage is Stage.READY:
            self._tell(ReplicaMovable(replica.id, is_movable=True))

    def _fail_start(self, replica: SimulatedReplica) -> None:
        if replica.stage is Stage.STARTING:
            self._run.num_start_failures += 1
            self._end(replica, "it did not start", True)

    def stop(self, order: StopReplica) -> None:
        """End a replica soon; an engine that is dead already reports its own end."""
        replica = self.replicas.get(order.replica)
        if replica is None or replica.stage is Stage.STOPPING:
            return
        assert not replica.ongoing, f"{replica.id} is stopped with {list(replica.ongoing)}"
        replica.stage = Stage.STOPPING
        self._agenda.after(replica.kind.stop_s, partial(self._end, replica, "stopped", False))

    def _end(self, replica: SimulatedReplica, reason: str, is_fault: bool) -> None:
        if replica.stage is not Stage.GONE:
            self._remove(replica)
            self._tell(ReplicaEnded(replica.id, reason, is_fault))

    def _crash(self, replica: SimulatedReplica) -> None:
        if replica.stage is not Stage.READY:
            return
        self._run.num_crashes += 1
        self._remove(replica)
        ended = ReplicaEnded(replica.id, "it crashed", is_fault=True)
        self._notice([partial(self._tell, ended)], [partial(self._interrupt, replica)])

    def _remove(self, replica: SimulatedReplica) -> None:
        """Remove a replica and free its slots."""
        replica.stage = Stage.GONE
        del self.replicas[replica.id]
        del replica.node.replicas[replica.id]
        self.count(replica)

    def count(self, replica: SimulatedReplica) -> None:
        """Add what the replica has held until now to the run's accelerator seconds."""
        self._run.accelerator_s += replica.kind.accelerators * (self._agenda.now_s - replica.ordered_s)

    def prefetch(self, order: PrefetchModel) -> None:
        """Read a model in the background: loads always take precedence (the store's I/O schedule)."""
        node, kind = self.nodes[order.node], self.classes[order.model]
        tier = node.tier(order.model)
        if node.is_lost or tier is Tier.HOST or order.model in node.fills:
            return
        node.fills[order.model] = kind.nbytes / node.kind.rate_bps(tier, accelerators=node.kind.num_slots)
        if len(node.fills) == 1:
            self._fill(node)

    def _fill(self, node: SimulatedNode) -> None:
        """Continue the first background read, once no load runs."""
        if not node.fills:
            return
        if node.load_until_s > self._agenda.now_s:
            self._agenda.at(node.load_until_s, partial(self._fill, node))
            return
        model, left_s = next(iter(node.fills.items()))
        self._agenda.after(left_s, partial(self._end_fill, node, model, (node.fills, node.loaded_s)))

    def _end_fill(self, node: SimulatedNode, model: str, begun: tuple[dict[str, float], float]) -> None:
        """Finish a background read, or extend it by the time that loads took meanwhile."""
        fills, loaded_s = begun
        if fills is not node.fills:
            return  # the node was lost meanwhile
        paused_s = node.loaded_s - loaded_s - max(0.0, node.load_until_s - self._agenda.now_s)
        if paused_s > 1e-9:
            node.fills[model] = paused_s
        else:
            self._run.num_prefetches += node.end_fill(model, self.classes[model])
            node.is_report_due = True
        self._fill(node)

    def validate(self) -> None:
        """Assert that no slot is used twice and no replica is in a wrong place or stage."""
        for node in self.nodes.values():
            assert node.num_free >= 0, f"{node.id} has {-node.num_free} slots less than its replicas use"
            assert not (node.is_lost and node.replicas), f"{node.id} is gone and has {list(node.replicas)}"
        for replica in self.replicas.values():
            assert replica.stage is not Stage.GONE, f"{replica.id} is gone"
            assert not replica.ongoing or replica.stage is Stage.READY, f"{replica.id} serves as {replica.stage}"
