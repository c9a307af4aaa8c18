"""The eviction policy, with numbers for blocks and nothing else."""

from __future__ import annotations

from shardkit.load.streaming.eviction import EvictionPolicy


def test_a_block_that_was_used_may_go_and_one_that_was_read_ahead_waits_for_its_use() -> None:
    policy = EvictionPolicy(3)
    for number in range(2):
        policy.on_read(number)
    policy.on_use(0)
    assert [policy.may_evict(number, expected=()) for number in range(2)] == [True, False]


def test_a_block_that_is_expected_stays_though_it_was_used() -> None:
    policy = EvictionPolicy(2)
    policy.on_read(0)
    policy.on_use(0)
    assert not policy.may_evict(0, expected={0})
    assert policy.may_evict(0, expected={1})


def test_a_block_that_nobody_came_for_goes_after_many_other_reads() -> None:
    policy = EvictionPolicy(4)
    policy.on_read(0)
    reads = 0
    while not policy.may_evict(0, expected={1, 2, 3}):
        policy.on_read(1 + reads % 3)
        reads += 1
    assert reads == 4 * 3 + 1


def test_a_block_that_is_read_again_waits_for_its_use_again() -> None:
    policy = EvictionPolicy(1)
    for _ in range(2):
        policy.on_read(0)
        assert not policy.may_evict(0, expected=())
        policy.on_use(0)
        assert policy.may_evict(0, expected=())
