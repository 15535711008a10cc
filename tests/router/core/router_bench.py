"""A core in a toy world that does what it says, sooner or later, and keeps its own books of every request."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.core.events import (
    Action,
    Dispatch,
    DrainAsked,
    Event,
    FirstByte,
    FirstToken,
    ModelDeleted,
    ModelDeployed,
    MoveAsked,
    MoveFailed,
    MoveRequest,
    NodeJoined,
    NodeLost,
    NodeReported,
    PrefetchModel,
    RejectRequest,
    ReplicaEnded,
    ReplicaMovable,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestGone,
    RequestMoved,
    StartReplica,
    StopReplica,
    Ticked,
    UndrainAsked,
)
from sllm_vllm.router.core.facts import FailureSign, ModelSpec, RequestFacts, RouterLimits, StartSample, Tier
from sllm_vllm.router.core.router import RouterCore


@dataclass(slots=True)
class Books:
    """Where every request is, as an outsider sees it."""

    waiting: dict[str, None] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    """Request to replica."""
    ended: set[str] = field(default_factory=set)
    rejected: dict[str, RejectRequest] = field(default_factory=dict)


class RouterBench:
    """Drives a core; after every event all invariants hold, and the books agree."""

    def __init__(self, limits: RouterLimits | None = None) -> None:
        self.core = RouterCore(limits)
        self.now_s = 0.0
        self.books = Books()
        self.starting: dict[str, StartReplica] = {}
        self.ready: dict[str, str] = {}
        """Replica to node."""
        self.stopping: dict[str, str] = {}
        self.lost: dict[str, None] = {}
        """Requests on a replica that is gone, whose ingress has not noticed."""
        self.moving: dict[str, MoveRequest] = {}
        """By request: orders that nobody has answered yet."""
        self.is_movable = True
        """Of replicas that become ready from now on."""
        self.drained: set[str] = set()
        """Nodes that take no starts."""
        self.dispatched: deque[str] = deque(maxlen=1000)
        self.num_requests = 0

    def tell(self, event: Event) -> list[Action]:
        """One event."""
        actions = self.core.handle(event, self.now_s)
        for action in actions:
            self._take(action)
        self.core.validate()
        self._compare()
        return actions

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass, and tell it."""
        self.now_s += seconds
        return self.tell(Ticked())

    def node(self, name: str = "n", num_slots: int = 2, **tiers: Tier) -> None:
        self.tell(NodeJoined(name, num_slots))
        self.tell(NodeReported(name, is_warm=True, residency=tiers))

    def deploy(self, name: str, **fields: object) -> ModelSpec:
        spec = ModelSpec(name, **fields)  # type: ignore[arg-type]
        self.tell(ModelDeployed(spec))
        return spec

    def delete(self, model: str) -> None:
        self.tell(ModelDeleted(model))

    def ask(self, model: str, **fields: object) -> str:
        """A request; its id."""
        self.num_requests += 1
        name = f"r{self.num_requests}"
        self.books.waiting[name] = None
        self.tell(RequestArrived(RequestFacts(name, model, **fields)))  # type: ignore[arg-type]
        return name

    def start(self, replica: str | None = None, *, seconds: float = 0.0, took_s: float = 1.0) -> str:
        """An ordered replica (the first, unless named) becomes ready. ``took_s``: as its engine reports it."""
        replica = replica or next(iter(self.starting))
        ordered = self.starting.pop(replica)
        self.ready[replica] = ordered.node
        self.now_s += seconds
        sample = StartSample(ordered.model, ordered.node, True, Tier.DISK, 1 << 20, 0.3, took_s - 0.6, 0.3)
        self.tell(ReplicaReady(replica, sample))
        if self.is_movable:
            self.tell(ReplicaMovable(replica, is_movable=True))
        return replica

    def fail_start(self, replica: str | None = None, reason: str = "exited with status 1") -> None:
        replica = replica or next(iter(self.starting))
        del self.starting[replica]
        self.tell(ReplicaEnded(replica, reason, is_fault=True))

    def stopped(self, replica: str | None = None) -> None:
        replica = replica or next(iter(self.stopping))
        del self.stopping[replica]
        self.tell(ReplicaEnded(replica, "stop asked"))

    def crash(self, replica: str) -> None:
        """A ready replica's engine dies; whoever reads from it has not noticed yet."""
        self.ready.pop(replica, None)
        self.stopping.pop(replica, None)
        self.lost.update(dict.fromkeys(name for name, where in self.books.running.items() if where == replica))
        self.tell(ReplicaEnded(replica, "ended by signal 9", is_fault=True))

    def drain(self, node: str) -> None:
        """An operator drains a node."""
        self.drained.add(node)
        self.tell(DrainAsked(node))

    def undrain(self, node: str) -> None:
        self.drained.discard(node)
        self.tell(UndrainAsked(node))

    def move(self, request: str) -> None:
        """A move that was ordered comes to its end: the target may be gone, which is noticed later."""
        order = self.moving.pop(request)
        self.books.running[request] = order.target
        self.lost.pop(request, None)
        if order.target not in self.core.cluster.replicas:
            self.lost[request] = None
        self.tell(RequestMoved(request, order.target))

    def fail_move(self, request: str, *, is_lasting: bool = False) -> None:
        order = self.moving.pop(request)
        self.tell(MoveFailed(request, order.target, "refused", is_lasting=is_lasting))

    def answer(self, request: str) -> None:
        self.tell(FirstByte(request))

    def generate(self, request: str) -> None:
        """Its engine has a token, which nobody has seen."""
        self.tell(FirstToken(request))

    def end(self, request: str) -> None:
        del self.books.running[request]
        self.moving.pop(request, None)
        self.lost.pop(request, None)
        self.books.ended.add(request)
        self.tell(RequestEnded(request, output_tokens=7))

    def leave(self, request: str) -> None:
        """The client goes away."""
        if self.books.running.pop(request, None) is None:
            del self.books.waiting[request]
        self.moving.pop(request, None)
        self.lost.pop(request, None)
        self.books.ended.add(request)
        self.tell(RequestGone(request))

    def notice(
        self,
        request: str,
        sign: FailureSign = FailureSign.BROKE_OFF,
        *,
        has_begun: bool = False,
        is_proven: bool = False,
    ) -> None:
        """The ingress notices that its engine failed, before a byte or after."""
        self.lost.pop(request, None)
        self.moving.pop(request, None)
        del self.books.running[request]
        self.books.waiting[request] = None
        self.tell(RequestFailed(request, "connection reset", sign, has_begun=has_begun, is_proven=is_proven))

    def _take(self, action: Action) -> None:
        match action:
            case StartReplica():
                assert action.replica not in self.starting
                assert action.node not in self.drained, f"{action.replica} is to start on {action.node}"
                self.starting[action.replica] = action
            case StopReplica():
                self.starting.pop(action.replica, None)
                self.ready.pop(action.replica, None)
                assert action.replica not in self.stopping, "told to stop twice"
                assert action.replica not in self.books.running.values(), "stopped with a request on it"
                self.stopping[action.replica] = action.node
            case Dispatch():
                del self.books.waiting[action.request]
                assert action.replica in self.ready, f"{action.request} goes to {action.replica}, which is not ready"
                assert self.ready[action.replica] not in self.drained, f"{action.request} goes to a drained node"
                self.books.running[action.request] = action.replica
                self.dispatched.append(action.request)
            case MoveRequest() if action.request in self.lost:
                pass  # whoever has it will notice, and then it runs nowhere
            case MoveRequest():
                assert self.books.running[action.request] == action.source
                assert action.target in self.ready, f"{action.request} moves to {action.target}, which is not ready"
                before = self.moving.get(action.request)
                is_over = before is None or before.target not in self.core.cluster.replicas
                assert is_over, f"{action.request} moves twice"
                self.moving[action.request] = action
            case RejectRequest():
                del self.books.waiting[action.request]
                assert action.reason
                self.books.rejected[action.request] = action
            case PrefetchModel():
                assert action.node not in self.drained, f"{action.model} is to be read on {action.node}"

    def _compare(self) -> None:
        """The core knows the same requests as whoever sent them."""
        living = {*self.books.waiting, *self.books.running}
        assert set(self.core.requests) == living
        replicas = {name for name, one in self.core.cluster.replicas.items() if one.model}
        assert replicas == {*self.starting, *self.ready, *self.stopping}
        states = self.core.cluster.replicas
        assert all(states[name].state in (ReplicaState.READY, ReplicaState.DRAINING) for name in self.ready)


def drive(seed: int, num_steps: int) -> RouterBench:
    """A core through random events; at the end everybody is served."""
    chance = random.Random(seed)
    limits = RouterLimits(waiting_max=chance.choice((5, 50)))
    bench = RouterBench(limits)
    models = [f"m{index}" for index in range(chance.randint(1, 5))]
    for index in range(chance.randint(1, 3)):
        tiers = {model: chance.choice((Tier.HOST, Tier.DISK)) for model in models if chance.random() < 0.5}
        bench.node(f"n{index}", chance.choice((1, 2, 4)), **tiers)
    for model in models:
        deploy_randomly(bench, model, chance)
    for _ in range(num_steps):
        step(bench, models, chance)
        bench.now_s += chance.expovariate(2.0)
    settle(bench)
    return bench


def deploy_randomly(bench: RouterBench, model: str, chance: random.Random) -> None:
    bench.deploy(
        model,
        generation=chance.randint(0, 1),
        lineage=chance.choice((0, 0, 1)),
        accelerators=chance.choice((1, 1, 1, 2)),
        min_replicas=chance.choice((0, 0, 0, 1)),
        max_replicas=chance.choice((1, 2, 3)),
        keep_alive_s=chance.choice((None, 0.0, 5.0)),
        target_ongoing=chance.choice((1, 2)),
        ongoing_max=chance.choice((2, 3)),
        priority=chance.choice((0, 0, 1)),
        queue_max=chance.choice((3, 100)),
        queue_s_max=chance.choice((20.0, 1000.0)),
    )


WEIGHTS = {
    "ask": 30,
    "start": 14,
    "fail": 1,
    "stopped": 12,
    "end": 22,
    "answer": 8,
    "tick": 12,
    "leave": 3,
    "crash": 1,
    "notice": 6,
    "token": 2,
    "node": 0.5,
    "drain": 0.5,
    "drain one": 0.5,
    "ask move": 2,
    "move": 12,
    "fail move": 3,
    "late move": 1,
    "deploy": 0.5,
}


def step(bench: RouterBench, models: list[str], chance: random.Random) -> None:
    """One thing happens, if it can; else time passes."""
    kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "ask":
        bench.ask(
            chance.choice(models),
            prefix=chance.choice(("", "a", "b")),
            prompt_tokens=chance.randint(1, 999),
            digest=f"d{chance.randint(1, 40)}",
        )
    elif kind == "node":
        change_nodes(bench, chance)
    elif kind == "drain":
        drain_or_undrain(bench, chance)
    elif kind in ("drain one", "ask move", "late move"):
        order_something(bench, kind, chance)
    elif kind == "deploy":
        bench.is_movable = chance.random() < 0.8
        model = chance.choice(models)
        if chance.random() < 0.3:
            bench.tell(ModelDeleted(model))
        deploy_randomly(bench, model, chance)
    elif not happen(bench, kind, chance):
        bench.wait(chance.choice((0.1, 1.0, 30.0)))


def happen(bench: RouterBench, kind: str, chance: random.Random) -> bool:
    """Something happens to one of those that it can happen to; False if there is none."""
    books = bench.books
    running = [name for name in books.running if name not in bench.lost]
    whom: dict[str, tuple[list[str], Callable[[str], None]]] = {
        "start": (list(bench.starting), lambda name: _drop(bench.start(name))),
        "fail": (list(bench.starting), bench.fail_start),
        "stopped": (list(bench.stopping), bench.stopped),
        "end": (running, bench.end),
        "answer": (running, bench.answer),
        "leave": ([*books.waiting, *books.running], bench.leave),
        "move": (list(bench.moving), bench.move),
        "fail move": (list(bench.moving), lambda name: bench.fail_move(name, is_lasting=chance.random() < 0.3)),
        "crash": (list(bench.ready), bench.crash),
        "notice": (list(bench.lost), lambda name: notice_somehow(bench, name, chance)),
        "token": (running, bench.generate),
        "tick": ([], bench.notice),
    }
    names, do = whom[kind]
    if names:
        do(chance.choice(names))
    return bool(names)


def notice_somehow(bench: RouterBench, request: str, chance: random.Random) -> None:
    """Streams that have begun can go on elsewhere, mostly; of others it is seen how their engine failed."""
    known = bench.core.requests[request]
    if (known.is_proven or known.has_begun) and chance.random() < 0.7:
        bench.notice(request, has_begun=True, is_proven=known.is_proven)
    else:
        bench.notice(request, chance.choice(list(FailureSign)))


def order_something(bench: RouterBench, kind: str, chance: random.Random) -> None:
    """Of an operator, who may ask for anything; or a word that comes too late."""
    requests = [*bench.books.running, *bench.books.waiting, "r0"]
    request, replica = chance.choice(requests), chance.choice([*bench.ready, "nobody"])
    if kind == "drain one":
        bench.tell(DrainAsked(replica))
    elif kind == "ask move":
        target = chance.choice((None, replica))
        is_possible = not bench.core.why_not_move(request, target, bench.now_s)
        ordered = [one for one in bench.tell(MoveAsked(request, target)) if isinstance(one, MoveRequest)]
        assert is_possible == any(one.request == request for one in ordered)
    else:
        order = bench.moving.get(request)
        if order is None or order.target != replica:
            bench.tell(chance.choice((RequestMoved(request, replica), MoveFailed(request, replica, "late"))))


def _drop(name: str) -> None:
    """Who became ready is of no interest."""


def change_nodes(bench: RouterBench, chance: random.Random) -> None:
    nodes = list(bench.core.cluster.nodes)
    if len(nodes) > 1 and chance.random() < 0.5:
        lose(bench, chance.choice(nodes))
    else:
        bench.node(f"n{len(nodes)}-{bench.num_requests}", chance.choice((1, 2, 4)))


def drain_or_undrain(bench: RouterBench, chance: random.Random) -> None:
    node = chance.choice(list(bench.core.cluster.nodes))
    (bench.undrain if node in bench.drained else bench.drain)(node)


def lose(bench: RouterBench, node: str) -> None:
    """A node goes away with all on it."""
    gone = {name for name, where in bench.ready.items() if where == node}
    gone |= {name for name, where in bench.stopping.items() if where == node}
    gone |= {name for name, order in bench.starting.items() if order.node == node}
    for name in gone:
        bench.ready.pop(name, None)
        bench.stopping.pop(name, None)
        bench.starting.pop(name, None)
    bench.lost.update(dict.fromkeys(name for name, where in bench.books.running.items() if where in gone))
    bench.tell(NodeLost(node))


def settle(bench: RouterBench) -> None:
    """Let everything come to its end: whoever waits is served or told."""
    for _ in range(3000):
        running = [name for name in bench.books.running if name not in bench.lost]
        if bench.lost:
            bench.notice(next(iter(bench.lost)))
        elif bench.moving:
            bench.move(next(iter(bench.moving)))
        elif bench.stopping:
            bench.stopped()
        elif bench.starting:
            bench.start()
        elif running:
            bench.end(running[0])
        elif bench.books.waiting:
            bench.wait(5.0)
        else:
            return
    raise AssertionError(f"these wait for ever: {list(bench.books.waiting)}")
