"""What holds between any two events. Pure; checks everything, so only for tests and the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm_vllm.node.core.replica import ENDED, HOLDING, STARTED_ONCE, NodeReplica, State

if TYPE_CHECKING:
    from sllm_vllm.node.core.agent import AgentCore


def validate(core: AgentCore) -> None:
    """Assert that the records agree, limits are kept, no slot leaks, and no order waits that could start."""
    for name, replica in core.replicas.items():
        assert replica.spec.id == name
        _validate_replica(replica)
        assert replica.misses < core.limits.unwell_max, f"{name} hangs and lives"
    holding = {name: replica.slots for name, replica in core.replicas.items() if replica.state in HOLDING}
    assert core.slots.owners() == holding, "a slot leaks, or is used twice"
    _validate_queues(core)


def _validate_replica(replica: NodeReplica) -> None:
    state = replica.state
    assert len(replica.slots) == (replica.spec.num_slots if state in HOLDING else 0)
    assert (replica.pid is not None) == (state in STARTED_ONCE) or state is State.STOPPING
    assert bool(replica.misses) == (state is State.UNWELL)
    is_plain = state in {State.STARTING, State.LOADING, State.READY}
    assert bool(replica.reason) != is_plain, f"{replica.spec.id} is {state.value}: {replica.reason!r}"
    assert not replica.is_faulty or state in {State.STOPPING, State.FAILED}
    assert replica.status is None or state in ENDED


def _validate_queues(core: AgentCore) -> None:
    replicas = core.replicas.items()
    assert list(core.waiting) == [name for name, replica in replicas if replica.state is State.WAITING], "not in order"
    assert len(core.waiting) <= core.limits.orders_max
    assert set(core.ended) == {name for name, replica in replicas if replica.state in ENDED}
    assert len(core.ended) <= core.limits.ended_max
    if core.waiting:
        wanted = core.replicas[core.waiting[0]].spec.num_slots
        assert core.slots.num_free < wanted <= core.slots.num_slots, f"{core.waiting[0]} waits in vain"
