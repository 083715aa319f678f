from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import Task, explain, plan_waves


def test_each_wave_tells_its_longest_task_and_who_waits() -> None:
    tasks = [Task(7, (0,), (2,), 6), Task(8, (1,), (3,), 2), Task(9, (0,), (3,), 3)]

    told = explain(plan_waves(tasks, strategy="first_fit"))

    assert [(share.wave, share.tasks, share.nbytes) for share in told.waves] == [(0, 2, 8), (1, 1, 3)]
    assert [(share.longest_task, share.longest_nbytes) for share in told.waves] == [(7, 6), (9, 3)]
    assert [share.busiest_port for share in told.waves] == ["actor 0", "actor 0"]
    assert [share.idle_share for share in told.waves] == [1 - 16 / 24, 1 - 6 / 12]
    assert (told.makespan_bytes, told.bound_bytes) == (9, 9)


def test_the_gap_is_told_by_what_makes_it() -> None:
    # Ports carry 5 bytes at most, but one has 5 in a single task and another 4 in two of 2: no colouring does below 5 +
    # 2.
    sizes = explain(plan_waves([Task(0, (0,), (1,), 5), Task(1, (2,), (3,), 2), Task(2, (2,), (4,), 2)]))
    assert (sizes.bound_bytes, sizes.size_bytes, sizes.order_bytes, sizes.conflict_bytes) == (5, 2, 0, 0)

    order = explain(plan_waves([Task(0, (0,), (1,), 5), Task(1, (2,), (3,), 4, after=(0,))]))
    assert (order.bound_bytes, order.size_bytes, order.order_bytes, order.conflict_bytes) == (5, 0, 4, 0)

    # Two waves would do for this path; first fit takes a third.
    path = [(0, 1), (3, 4), (2, 3), (1, 2)]
    tasks = [Task(id, (sender,), (receiver,), 2) for id, (sender, receiver) in enumerate(path)]
    conflicts = explain(plan_waves(tasks, strategy="first_fit"))
    assert (conflicts.bound_bytes, conflicts.size_bytes, conflicts.wave_bytes, conflicts.order_bytes) == (4, 0, 0, 0)
    assert conflicts.conflict_bytes == 2


def test_waves_that_every_colouring_needs_are_no_conflicts() -> None:
    # Three tasks that all meet, two a port; 33 actors that all exchange, 64 a port, of which 16 fit beside each other.
    triangle = explain(plan_waves([Task(0, (0,), (1,), 3), Task(1, (1,), (2,), 3), Task(2, (2,), (0,), 3)]))
    assert (triangle.bound_bytes, triangle.size_bytes, triangle.wave_bytes) == (6, 0, 3)
    assert (triangle.order_bytes, triangle.conflict_bytes) == (0, 0)

    pairs = [(a, b) for a in range(33) for b in range(33) if a != b]
    schedule = plan_waves([Task(id, (a,), (b,), 10) for id, (a, b) in enumerate(pairs)])
    colocated = explain(schedule)
    assert len(schedule.waves) == schedule.bound.waves == 66
    assert (colocated.bound_bytes, colocated.size_bytes, colocated.wave_bytes) == (640, 0, 20)
    assert (colocated.order_bytes, colocated.conflict_bytes) == (0, 0)


def test_waves_that_only_a_chain_needs_are_for_its_order() -> None:
    # The chain needs two waves beside that of the longest task, of a byte at least. That the two long tasks do not meet
    # is for the colouring.
    chain = [Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1, (0,)), Task(2, (4,), (5,), 3, (1,)), Task(3, (6,), (7,), 5)]
    told = explain(plan_waves(chain, strategy="first_fit"))

    assert (told.makespan_bytes, told.bound_bytes, told.size_bytes, told.wave_bytes) == (9, 5, 0, 0)
    assert (told.order_bytes, told.conflict_bytes) == (2, 2)


def test_the_table_is_aligned_and_may_be_cut_short() -> None:
    tasks = [Task(id, (0,), (1 + id,), 10**id) for id in range(4)]

    *table, gap = explain(plan_waves(tasks, ports="full")).lines(limit=2)

    assert table == [
        "wave  tasks  bytes  longest task  its bytes         busiest port   idle",
        "   0      1   1000             3       1000  out-port of actor 0  60.0%",
        "   1      1    100             2        100  out-port of actor 0  60.0%",
        "... and 2 more waves",
    ]
    assert gap == (
        "makespan 1111 bytes: 1111 through the busiest port, "
        "and 0 more: 0 for tasks of unlike size, 0 for waves that any colouring needs, 0 for their order, "
        "0 for conflicts"
    )


def test_nothing_has_nothing_to_explain() -> None:
    told = explain(plan_waves([]))

    assert (told.waves, told.makespan_bytes, told.conflict_bytes) == ((), 0, 0)


@given(data=st.data())
def test_the_parts_add_up_and_none_is_negative(data: st.DataObject) -> None:
    actors = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)
    tasks = [
        Task(
            id,
            data.draw(actors),
            data.draw(actors),
            data.draw(st.integers(0, 9)),
            tuple(data.draw(st.lists(st.integers(0, id - 1), max_size=1))) if id else (),
        )
        for id in range(data.draw(st.integers(0, 10)))
    ]

    told = explain(plan_waves(tasks, strategy=data.draw(st.sampled_from(("auto", "first_fit")))))

    parts = (told.bound_bytes, told.size_bytes, told.wave_bytes, told.order_bytes, told.conflict_bytes)
    assert sum(parts) == told.makespan_bytes
    assert min(parts) >= 0
    assert sum(share.nbytes for share in told.waves) == sum(task.nbytes for task in tasks)
    assert all(0 <= share.idle_share <= 1 for share in told.waves)
