"""The sync benchmark's cases, what it makes of their figures, and what it writes: all without a process of its own."""

from __future__ import annotations

import functools
import importlib
import json
import operator
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
import torch

from tests.runtime.transfer.crew import Crew, Wires, planned
from wavecast.runtime.errors import ActorDied, ConfigError
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.report import PhaseSeconds, SyncReport
from wavecast.scheduler import STRATEGIES, RunReport

ROOT = Path(__file__).parents[2]
MODULES = (
    "common",
    "processes",
    "ceilings",
    "sync_cases",
    "sync_traffic",
    "sync_measure",
    "sync_table",
    "sync_chart",
    "bench_sync",
    "trace_sync",
    "gpu_faults",
    "bench_plan",
    "bench_schedule",
    "layout_zoo",
    "soak",
    "soak_ray",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The command's modules: benchmarks are scripts, found beside each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def case(bench, name):
    (found,) = bench.sync_cases.find_cases(suite=None, names=[name])
    return found


# Cases.


def test_names_are_unique_and_each_suite_has_its_cases(bench):
    names = [found.name for found in bench.sync_cases.CASES]
    assert len(set(names)) == len(names)
    sizes = {suite: len(bench.sync_cases.find_cases(suite=suite, names=())) for suite in bench.sync_cases.SUITES}
    assert sizes == {"one": 5, "two": 13, "four": 11, "schedules": 3 + len(STRATEGIES), "cpu": 18}


@pytest.mark.parametrize(("suite", "gpus"), [("one", 1), ("two", 2), ("four", 4), ("schedules", 4)])
def test_cases_fit_the_gpus_of_their_suite(bench, suite, gpus):
    for found in bench.sync_cases.find_cases(suite=suite, names=()):
        assert found.reason_to_skip(gpus) is None
        assert found.sync_options().checksum


def test_every_case_has_an_actor_for_each_rank_and_all_of_the_model(bench):
    for found in bench.sync_cases.find_cases(suite="cpu", names=()):
        assert len(bench.sync_cases.trainer_memories(found)) == len(found.trainers)
        plan = bench.sync_traffic.plan_case(found)
        assert plan.actors == len(found.places)
        assert plan.nbytes >= bench.sync_cases.model_nbytes(found) * len(found.engines)


def test_the_moe_case_has_18867_tensors_of_61_gigabytes(bench):
    found = case(bench, "across-30b-moe")
    (memory,) = bench.sync_cases.trainer_memories(found)
    assert len(memory.layout.pieces) == 18_867
    assert memory.nbytes == 61_064_245_248


def test_an_actor_is_told_its_gpu_by_index(bench):
    found = case(bench, "colocated-tp4")
    assert found.places == (0, 1, 2, 3, 0, 1, 2, 3)
    assert [found.device(actor) for actor in (0, 3, 4, 7)] == ["cuda:0", "cuda:3", "cuda:0", "cuda:3"]
    assert case(bench, "cpu-colocated-tp4").device(5) == "cpu"


def test_a_case_is_skipped_where_gpus_are_missing_and_says_how_many(bench):
    assert case(bench, "a-tp2-to-tp2").reason_to_skip(2) == "needs 4 GPUs, 2 are here"
    assert case(bench, "across-7b").reason_to_skip(1) == "needs 2 GPUs, 1 are here"
    assert case(bench, "cpu-a-tp2-to-tp2").reason_to_skip(0) is None


def test_an_unknown_case_is_refused_by_name(bench):
    with pytest.raises(ConfigError, match="unknown case 'across-8b'"):
        bench.sync_cases.find_cases(suite=None, names=["across-8b"])


def test_a_side_with_another_number_of_ranks_than_gpus_is_refused(bench):
    wrong = replace(case(bench, "cpu-across-7b"), src="tp=3")
    with pytest.raises(ConfigError, match="'tp=3' has 3 ranks and is placed on 1 GPUs"):
        bench.sync_cases.trainer_memories(wrong)


def test_fsdp2_gives_each_rank_rows_of_every_parameter(bench):
    first, second = bench.sync_cases.trainer_memories(case(bench, "cpu-fsdp2-to-tp2"))
    assert {piece.tensor for piece in first.layout.pieces} == {piece.tensor for piece in second.layout.pieces}
    assert {piece.box.extent[0] for piece in first.layout.pieces if piece.tensor == "model.norm.weight"} == {192}
    assert {piece.box.offset[0] for piece in second.layout.pieces if piece.tensor == "model.norm.weight"} == {192}


def test_cases_of_the_user_share_gpus_when_there_are_fewer_than_actors(bench):
    words = {"preset": "tiny-qwen2", "layers": 1, "dtype": "bfloat16", "transport": "auto", "budget_bytes": 1 << 20}
    found = bench.sync_cases.ad_hoc(src="tp=2", dst="tp=1", replicas=2, gpus=2, options=(), **words)
    assert (found.trainers, found.engines, found.device(3)) == ((0, 0), ((1,), (1,)), "cuda:1")
    on_cpu = bench.sync_cases.ad_hoc(src="tp=2", dst="tp=1", replicas=2, gpus=0, options=(), **words)
    assert (on_cpu.trainers, on_cpu.engines, on_cpu.device(3)) == ((0, 1), ((2,), (3,)), "cpu")
    with pytest.raises(ConfigError, match="replicas is 0"):
        bench.sync_cases.ad_hoc(src="tp=1", dst="tp=1", replicas=0, gpus=0, options=(), **words)


def test_options_reach_the_group_and_unknown_transports_do_not(bench):
    options = replace(case(bench, "across-7b-256mib"), options=(("in_flight", 3),)).sync_options()
    assert (options.budget_bytes, options.in_flight, options.transport) == (256 << 20, 3, "auto")
    with pytest.raises(ConfigError, match="carrier"):
        replace(case(bench, "across-7b"), transport="carrier").sync_options()


def test_options_of_the_command_override_those_of_a_case(bench):
    found = case(bench, "schedule-barriers").with_options({"lookahead": 2, "budget_bytes": 1 << 20, "in_flight": 4})
    options = found.sync_options()
    assert (options.lookahead, options.budget_bytes, options.in_flight) == (2, 1 << 20, 4)
    assert bench.bench_sync.named_option("in_flight=3") == ("in_flight", 3)
    assert bench.bench_sync.named_option("transport=nccl") == ("transport", "nccl")


def test_an_option_that_the_group_does_not_have_is_refused_by_name(bench):
    with pytest.raises(ConfigError, match="no option 'speed', given as 9"):
        case(bench, "across-7b").with_options({"speed": 9}).sync_options()


def test_a_transport_of_gpus_is_refused_for_a_case_in_host_memory(bench):
    for transport in ("nccl", "ipc"):
        with pytest.raises(ConfigError, match=f"transport '{transport}' moves GPU memory, case 'cpu-across-7b'"):
            case(bench, "cpu-across-7b").with_options({"transport": transport}).sync_options()


def test_the_size_of_a_side_is_read_with_its_kind(bench):
    assert [bench.sync_cases._ranks(side) for side in ("fsdp2=3", "vllm=2", "flat=8", "tp=2,pp=2", "")] == [
        3,
        2,
        1,
        4,
        1,
    ]


# Traffic.


def traffic(bench, name):
    found = case(bench, name)
    return bench.sync_traffic.traffic_of(found, bench.sync_traffic.plan_case(found))


def test_what_crosses_is_told_from_what_stays(bench):
    found = traffic(bench, "colocated-7b")
    assert found.edges == ((0, 1), (1, 0))
    assert (found.port_bytes, found.crossing_bytes, found.local_bytes) == (7_615_620_096, 15_231_233_024, 7_615_620_096)


def test_edges_that_carry_only_norms_do_not_make_the_pattern(bench):
    assert traffic(bench, "a-tp2-to-tp2").edges == ((0, 2), (1, 3))


def test_a_fan_out_is_known_as_a_broadcast_that_leaves_once(bench):
    found = traffic(bench, "d-fan-out-3")
    assert found.is_broadcast
    assert (found.port_bytes, found.crossing_bytes) == (15_231_233_024, 45_693_699_072)
    assert not traffic(bench, "b-whole-to-tp2").is_broadcast


# Ceilings.


def test_a_ceiling_counts_the_busiest_port(bench):
    crossed = bench.ceilings.Ceiling("sendrecv", ((0, 2), (0, 3), (1, 2), (1, 3)), 10, "cuda")
    assert crossed.port_bytes == 20
    assert crossed.name == "sendrecv 0>2 0>3 1>2 1>3"
    fan = ((0, 1), (0, 2), (0, 3))
    assert bench.ceilings.Ceiling("sendrecv", fan, 10, "cuda").port_bytes == 30
    assert bench.ceilings.Ceiling("broadcast", fan, 10, "cuda").port_bytes == 10


def measured(bench, monkeypatch, answers):
    """Return a book whose processes give these answers by pattern, and the list of what they were asked."""
    asked: list[tuple[str, ...]] = []

    def answer(entry, ceilings, *, world, device, seconds):
        asked.append((*ceilings, f"{world} {device}"))
        lost = {"error": "rank 1: no peer access"}
        return {name: {"seconds": answers[name]} if name in answers else lost for name in ceilings}

    monkeypatch.setattr(bench.ceilings, "run_in_turn", answer)
    return bench.ceilings.CeilingBook(device="cuda", seconds=1.0), asked


def test_a_pattern_is_measured_once_and_the_best_way_is_its_ceiling(bench, monkeypatch):
    answers = {"sendrecv 0>2 1>3": [0.02, 0.03, 0.04], "ipc 0>2 1>3": [0.02], "copy within a GPU": [0.1]}
    book, asked = measured(bench, monkeypatch, answers)
    first = book.measure(edges=((0, 2), (1, 3)), port_bytes=10**10, broadcast=False, local=True)
    assert [row["pattern"] for row in first] == ["sendrecv 0>2 1>3", "ipc 0>2 1>3", "copy within a GPU"]
    assert bench.ceilings.best_rate(first) == (8 << 30) / 0.02 / 1e9
    assert bench.ceilings.local_rate(first) == (4 << 30) / 0.1 / 1e9
    assert first[0]["seconds"] == {"p50": 0.03, "min": 0.02, "max": 0.04}
    assert book.measure(edges=((0, 2), (1, 3)), port_bytes=61 * 10**9, broadcast=False, local=False) == first[:2]
    assert asked == [("sendrecv 0>2 1>3", "ipc 0>2 1>3", "copy within a GPU", "4 cuda")]
    assert book.rows == first


def test_a_ceiling_that_failed_says_why_and_costs_the_others_nothing(bench, monkeypatch):
    book, _ = measured(bench, monkeypatch, {"sendrecv 0>1": [0.5]})
    rows = book.measure(edges=((0, 1),), port_bytes=10**9, broadcast=False, local=False)
    assert rows[1]["error"] == "rank 1: no peer access"
    assert bench.ceilings.best_rate(rows) == (10**9) / 0.5 / 1e9
    assert bench.ceilings.best_rate(rows[1:]) is None


def test_receivers_of_the_same_sources_begin_at_different_ones(bench):
    assert [bench.ceilings._staggered([0, 1], rank) for rank in (2, 3)] == [[0, 1], [1, 0]]


# Processes.


def test_rows_are_kept_and_a_member_that_fails_is_named(bench):
    fine = bench.processes.run_processes(operator.methodcaller("report", {"a": 1}), world=2, device="cpu", seconds=50)
    assert fine == bench.processes.Outcome(({"a": 1}, {"a": 1}), None)
    failed = bench.processes.run_processes(operator.attrgetter("lost"), world=1, device="cpu", seconds=50)
    assert failed.error.startswith("rank 0: AttributeError: 'Member' object has no attribute 'lost'")


def test_an_item_that_fails_costs_those_behind_it_nothing(bench):
    edges = ((0, 1),)
    items = {
        "odd": bench.ceilings.Ceiling("unheard of", edges, 64, "cpu"),
        "fine": bench.ceilings.Ceiling("sendrecv", edges, 64, "cpu"),
    }
    found = bench.processes.run_in_turn(bench.ceilings._measure, items, world=2, device="cpu", seconds=50)
    assert found["odd"]["error"].partition("\n")[0].endswith("KeyError: 'unheard of'")
    assert len(found["fine"]["seconds"]) == 10


def test_members_that_take_too_long_are_ended(bench):
    late = bench.processes.run_processes(operator.attrgetter("rank"), world=1, device="cpu", seconds=0.001)
    assert late == bench.processes.Outcome((), "not done after 0 s")


# Figures.


def report(total: float, **changes: object) -> SyncReport:
    seconds = PhaseSeconds(0.001, 0.0, 0.0, total - 0.003, 0.001, 0.001, total)
    found = SyncReport(
        version=1,
        dry_run=False,
        nbytes=1000,
        tensors=3,
        partial=False,
        routes=3,
        tasks=2,
        waves=1,
        bound_waves=1,
        makespan_bytes=1000,
        bound_bytes=1000,
        gap=1.0,
        strategy="auto",
        ports="half",
        transport="nccl",
        pulled_nbytes=0,
        transport_reasons=("asked for",),
        device="cuda",
        staging_bytes=64,
        communicator_bytes=128,
        host_seconds=0.004,
        connected=False,
        planned=False,
        seconds=seconds,
        reshard_seconds=0.1,
        schedule_seconds=0.2,
        run=RunReport(0.0, ()),
        digest="d",
    )
    return replace(found, **changes)


def seen(bench, wall, differing=None):
    return bench.sync_measure.Seen(tuple(report(value) for value in wall), tuple(wall), differing or {}, 256)


def ceilings(rate: float) -> list[dict[str, object]]:
    return [{"pattern": "ipc 0>1", "kind": "ipc", "gigabytes_per_second": rate}]


def row_of(bench, name, wall, rate=380.0, **kwargs):
    found = case(bench, name)
    figures = bench.sync_measure.figures(found, traffic(bench, name), seen(bench, wall, **kwargs), ceilings(rate))
    return {**bench.sync_measure.case_facts(found), "status": "ok", **figures}


def test_figures_are_of_the_warm_syncs_alone_and_go_into_json(bench):
    row = json.loads(json.dumps(row_of(bench, "across-7b", [3.0, 0.05, 0.04, 0.06])))
    assert row["warm"]["wall"] == {"p50": 0.05, "p95": 0.06, "min": 0.04}
    assert row["warm"]["count"] == 3
    assert row["warm"]["verify"]["p50"] == 0.001
    assert row["first"]["wall"] == 3.0
    assert row["port_gigabytes_per_second"] == pytest.approx(15_231_233_024 / 0.05 / 1e9)
    assert row["share_of_ceiling"] == pytest.approx(0.8016, abs=1e-4)
    assert row["meets_bar"] is False
    assert row["placement"] == {"trainers": [0], "engines": [[1]]}
    assert (row["staging_bytes"], row["communicator_bytes"], row["extra_device_bytes"]) == (64, 128, 256)


def test_a_case_meets_its_bar_at_its_share_of_the_ceiling(bench):
    assert row_of(bench, "across-7b", [1.0, 0.0435])["meets_bar"] is True
    assert row_of(bench, "across-7b", [1.0, 0.0437])["meets_bar"] is False


def test_the_fixed_cost_is_held_against_the_time_on_the_wire(bench):
    row = row_of(bench, "across-0.5b", [1.0, 0.0105])
    assert row["allowed_seconds"] == pytest.approx(988_065_536 / 380e9 + 0.008)
    assert row["meets_bar"] is True


def test_bytes_that_stay_may_take_what_a_terabyte_a_second_takes(bench):
    row = row_of(bench, "colocated-7b", [1.0, 0.032])
    assert row["allowed_seconds"] == pytest.approx(7_615_620_096 / (0.8 * 380e9) + 7_615_620_096 / 1e12)
    assert row["meets_bar"] is True


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("no room"), "ValueError: no room"),
        (TimeoutError(), "the case was not done after 7 s"),
        (ActorDied("it is gone", actors=(1,)), "ActorDied: it is gone"),
    ],
)
def test_a_case_that_fails_is_a_row_like_the_others(bench, monkeypatch, raised, said):
    async def fail(case, *, repeat, seconds):
        raise raised

    monkeypatch.setattr(bench.sync_measure, "_syncs", fail)
    book, _ = measured(bench, monkeypatch, {"sendrecv 0>1": [0.5]})
    run = functools.partial(bench.sync_measure.run_case, repeat=1, seconds=7.0)
    row = anyio.run(run, case(bench, "cpu-across-7b"), book)
    assert (row["name"], row["status"]) == ("cpu-across-7b", "failed")
    assert row["error"].startswith(said)
    assert json.loads(json.dumps(row)) == row


def test_without_a_ceiling_there_is_no_share_and_no_verdict(bench):
    found = case(bench, "across-7b")
    figures = bench.sync_measure.figures(found, traffic(bench, "across-7b"), seen(bench, [1.0, 0.1]), [])
    assert (figures["share_of_ceiling"], figures["meets_bar"]) == (None, None)


def test_a_bar_on_the_host_thread_counts_too(bench):
    row = row_of(bench, "across-30b-moe", [1.0, 0.16])
    assert (row["host_seconds"], row["meets_bar"]) == (0.004, True)
    found, busy = case(bench, "across-30b-moe"), seen(bench, [1.0, 0.16])
    slow = replace(busy, reports=tuple(replace(each, host_seconds=0.011) for each in busy.reports))
    figures = bench.sync_measure.figures(found, traffic(bench, found.name), slow, ceilings(380.0))
    assert (figures["host_seconds"], figures["meets_bar"]) == (0.011, False)


@pytest.mark.parametrize(("seconds", "meets"), [(0.0200, True), (0.0201, False)])
def test_a_bar_on_the_engines_pause_counts_alone(bench, seconds, meets):
    found, quick = case(bench, "across-7b-shadow"), seen(bench, [1.0, 0.5, 0.5])
    first, warm, slowest = (replace(each, pause_seconds=0.004) for each in quick.reports)
    slow = replace(quick, reports=(first, warm, replace(slowest, pause_seconds=seconds)))
    figures = bench.sync_measure.figures(found, traffic(bench, found.name), slow, ceilings(380.0))
    assert figures["pause_seconds"] == {"p50": 0.004, "p95": seconds, "min": 0.004}
    assert (figures["allowed_seconds"], figures["meets_bar"]) == (None, meets)
    row = {**bench.sync_measure.case_facts(found), "status": "ok", **figures}
    verdict = "met" if meets else "missed"
    assert f"pause {seconds * 1e3:.1f} of 20 ms, {verdict}" in bench.sync_table.as_markdown({"cases": [row]})


# The table, the chart and the command.


def results(bench) -> dict[str, object]:
    skipped = case(bench, "a-tp2-to-tp2")
    failed = case(bench, "across-7b-ipc")
    return {
        "ceilings": ceilings(380.0),
        "cases": [
            row_of(bench, "across-7b", [3.0, 0.05, 0.04, 0.06]),
            {**bench.sync_measure.case_facts(skipped), "status": "skipped", "reason": "needs 4 GPUs, 2 are here"},
            {**bench.sync_measure.case_facts(failed), "status": "failed", "error": "ConfigError: no\nmore | of it"},
        ],
        "baselines": [
            {
                "case": "across-7b",
                "name": "seed",
                "title": "the seed's way",
                "port_bytes": 15_231_233_024,
                "seconds": {"p50": 0.06, "p95": 0.07, "min": 0.05},
                "first_seconds": 0.5,
                "verified": True,
                "share_of_ceiling": 0.67,
            },
            {"case": "across-7b", "name": "per_tensor", "title": "a tensor", "error": "rank 1: lost"},
        ],
    }


def test_the_table_has_a_line_for_each_case_and_what_ran_beside_it(bench):
    lines = bench.sync_table.as_markdown(results(bench)).splitlines()
    assert lines[2:] == [
        "| 7B dense, 1 to 1, a GPU each | 50.0 | 60.0 | 304.6 | 0.80 | 0.92, missed | 3.00 | 0 + 0 | yes |",
        "| ... the seed's way | 60.0 | 70.0 | 253.9 | 0.67 |  | 0.50 |  | yes |",
        "| ... a tensor | rank 1: lost |  |  |  |  |  |  |  |",
        "| A. 7B dense, TP2 to TP2 | skipped: needs 4 GPUs, 2 are here |  |  |  |  |  |  |  |",
        "| 7B dense, 1 to 1, CUDA IPC | failed: ConfigError: no |  |  |  |  |  |  |  |",
    ]


def test_a_person_gets_a_line_each(bench):
    assert bench.sync_table.as_lines(results(bench)) == [
        "ceiling   ipc 0>1: 380.0 GB/s",
        "case      across-7b: p50 50.0 ms, p95 60.0 ms, 0.80 of the ceiling, BELOW ITS BAR",
        "case      a-tp2-to-tp2: skipped: needs 4 GPUs, 2 are here",
        "case      across-7b-ipc: FAILED: ConfigError: no",
        "baseline  across-7b seed: p50 60.0 ms",
        "baseline  across-7b per_tensor: FAILED: rank 1: lost",
    ]


def test_bars_are_of_cases_with_figures_and_baselines_with_shares(bench):
    ((row, shares),) = bench.sync_chart.bars_of([results(bench)])
    assert row["name"] == "across-7b"
    assert shares == {"wavecast": pytest.approx(0.8016, abs=1e-4), "seed": 0.67}


def test_the_bar_in_the_chart_allows_what_the_bar_of_the_case_allows(bench):
    assert bench.sync_chart.bar_of(row_of(bench, "across-7b", [1.0, 0.05])) == pytest.approx(0.92)
    # 20.0 ms at the ceiling, 25.1 at the bar's share, and 7.6 for the bytes that stay.
    assert bench.sync_chart.bar_of(row_of(bench, "colocated-7b", [1.0, 0.05])) == pytest.approx(0.6134, abs=1e-4)
    assert bench.sync_chart.bar_of({"allowed_seconds": None, "port_bytes": 1}) is None


def test_the_chart_is_drawn_the_same_twice(bench, tmp_path):
    pytest.importorskip("matplotlib")
    first = bench.sync_chart.plot([results(bench)], tmp_path / "a").read_bytes()
    assert bench.sync_chart.plot([results(bench)], tmp_path / "b").read_bytes() == first
    assert b"across-7b" in first


def test_results_are_on_disk_after_every_case(bench, tmp_path, capsys):
    path = tmp_path / "deep" / "results.json"
    written: dict[str, object] = {"cases": []}
    keep = bench.bench_sync._keeper(written, str(path))
    written["cases"] = [{"name": "one"}]
    keep("one: done")
    assert json.loads(path.read_text()) == {"cases": [{"name": "one"}]}
    assert capsys.readouterr().err == "one: done\n"
    assert [found.name for found in path.parent.iterdir()] == ["results.json"]


def test_results_go_into_a_pipe_and_do_not_replace_it(bench, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert bench.common.results_file(str(pipe)) == str(pipe)
        bench.common.write_results(str(pipe), {"cases": []})
        assert json.loads(os.read(reader, 1 << 10)) == {"cases": []}
    finally:
        os.close(reader)

    assert [found.name for found in tmp_path.iterdir()] == ["pipe"]


def test_asking_whether_results_can_be_written_leaves_the_earlier_ones(bench, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("earlier")
    assert bench.common.results_file(str(path)) == str(path)
    assert path.read_text() == "earlier"
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def refused(module, words, capsys, monkeypatch):
    """Return the line that ``main`` ends in with status 2, having started no cluster and run nothing."""

    def started(*_, **__):
        raise AssertionError(f"{words} were not refused at once")

    for name in ("cluster", "start_ray"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, started)

    try:
        status = module.main(words)
    except SystemExit as end:
        status = end.code

    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("way", ["--src", "--dst"])
@pytest.mark.parametrize(
    ("side", "found"),
    [
        ("fsdp2=x", "side 'fsdp2=x': fsdp2='x' is not"),
        ("fsdp2", "side 'fsdp2': fsdp2='' is not"),
        ("fsdp2=-1", "side 'fsdp2=-1': fsdp2='-1' is not"),
        ("flat=0", "side 'flat=0': flat='0' is not a whole number from 1 to 1024"),
        ("flat=x", "side 'flat=x': flat='x' is not"),
        ("flat=999999999", "side 'flat=999999999': flat='999999999' is not"),
        ("vllm=", "side 'vllm=': vllm='' is not"),
        ("vllm=1,tp=2", "side 'vllm=1,tp=2': vllm='1,tp=2' is not"),
        ("vllm=5", "tp_size=5 does not divide"),
        ("tp=0", "mesh 'tp=0': tp='0' is not a positive integer"),
        ("zero=2", "mesh 'zero=2': 'zero=2' is not AXIS=SIZE"),
        ("dp=999999999", "takes 1000000000 actors, it may take at most 1024"),
    ],
)
def test_a_side_that_cannot_be_is_refused_at_once(bench, capsys, monkeypatch, way, side, found):
    words = ["--preset", "tiny-qwen2", "--layers", "1", way, side]
    assert found in refused(bench.bench_sync, words, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--suite", "cpu", "--set", "budget_bytes=abc"], "option budget_bytes is 'abc', it must be an integer"),
        (["--suite", "cpu", "--set", "budget_bytes=-1"], "option budget_bytes is -1, it must be at least 65536"),
        (["--suite", "cpu", "--set", "nope=1"], "the group has no option 'nope', given as 1"),
        (["--suite", "two", "--set", "nope=1"], "the group has no option 'nope', given as 1"),
        (["--suite", "cpu", "--set", "transport=nonsense"], "option transport is 'nonsense', it must be auto"),
        (["--suite", "cpu", "--set", "transport=nccl"], "transport 'nccl' moves GPU memory"),
        (["--suite", "cpu", "--set", f"in_flight={'1' * 5000}"], "option in_flight is '111"),
        (["--suite", "cpu", "--set", "in_flight"], "argument --set: 'in_flight' is not NAME=VALUE"),
        (["--suite", "nope"], "argument --suite: invalid choice: 'nope'"),
        (["--preset", "nope"], "unknown preset 'nope'; known: "),
        (["--preset", "tiny-qwen2", "--dtype", "nope"], "unknown dtype 'nope'; known: "),
        (["--preset", "tiny-qwen2", "--layers", "0"], "layers=0 is not between 1 and"),
        (["--preset", "tiny-qwen2", "--replicas", "0"], "replicas is 0"),
        (["--preset", "tiny-qwen2", "--in-flight", "0"], "option in_flight is 0"),
        (["--repeat", "0"], "argument --repeat: '0' is not a whole number of at least 1"),
        (["--repeat", "x"], "argument --repeat: 'x' is not a whole number of at least 1"),
        (["--case-seconds", "nan"], "argument --case-seconds: 'nan' is not a positive number of seconds"),
        (["--ceiling-seconds", "-1"], "argument --ceiling-seconds: '-1' is not a positive number of seconds"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(bench, capsys, monkeypatch, words, found):
    assert found in refused(bench.bench_sync, words, capsys, monkeypatch)


@pytest.mark.parametrize(("script", "words"), [("bench_sync", ["--list"]), ("trace_sync", ["--case", "cpu-across-7b"])])
@pytest.mark.parametrize(
    ("place", "why"), [("/proc/nope/x", "No such file or directory"), ("{folder}", "Is a directory")]
)
def test_results_that_cannot_be_written_are_refused_at_once(
    bench, capsys, monkeypatch, tmp_path, script, words, place, why
):
    where = place.format(folder=tmp_path)
    line = refused(getattr(bench, script), [*words, "--json", where], capsys, monkeypatch)
    assert line.endswith(f"argument --json: cannot write to {where!r}: {why}")


@pytest.mark.parametrize(
    ("script", "words", "found"),
    [
        ("trace_sync", ["--case", "nope"], "trace_sync: unknown case 'nope'; known: across-7b, "),
        ("trace_sync", ["--case", "cpu-across-7b", "--warm", "0"], "argument --warm: '0' is not a whole number"),
        ("trace_sync", ["--case", "cpu-across-7b", "--set", "nope=1"], "the group has no option 'nope', given as 1"),
        ("trace_sync", ["--case", "cpu-across-7b", "--set", "budget_bytes=-1"], "option budget_bytes is -1"),
        ("trace_sync", ["--case", "cpu-across-7b", "--profile", "/proc/nope"], "cannot write traces to '/proc/nope'"),
        ("gpu_faults", ["--device", "cpu", "--model", "nope"], "gpu_faults: unknown preset 'nope'; known: "),
        ("gpu_faults", ["--device", "cpu", "--model", "tiny-qwen2"], "model 'tiny-qwen2' has 18683648 bytes here"),
        ("gpu_faults", ["--device", "cpu", "--transports", "nccl"], "goes over gloo alone, not nccl"),
        ("bench_plan", ["--repeat", "0"], "--repeat is 0: it must be 1 or more"),
        ("bench_plan", ["nope"], "unknown case 'nope'; known: qwen2.5-7b, "),
        ("soak", ["--syncs", "0"], "--syncs is 0: it must be 1 or more"),
        ("soak_ray", ["--syncs", "-3"], "--syncs is -3: it must be 1 or more"),
        ("sync_chart", ["/proc/nope"], "/proc/nope holds no results: "),
        ("bench_schedule", ["--from", "/proc/nope"], "--from: /proc/nope holds no earlier figures"),
        ("bench_schedule", ["--docs", __file__], "test_bench_sync.py lacks the markers"),
        ("layout_zoo", ["--write", __file__], "test_bench_sync.py lacks the markers"),
        ("layout_zoo", ["--only", "nope"], "--only: no case has 'nope' in its name"),
    ],
)
def test_other_scripts_refuse_what_cannot_be_at_once(bench, capsys, monkeypatch, script, words, found):
    assert found in refused(getattr(bench, script), words, capsys, monkeypatch)


@pytest.mark.parametrize("script", ["sync_chart", "bench_schedule"])
@pytest.mark.parametrize("text", ["{}", "[1]"])
def test_a_file_without_figures_is_refused_as_one(bench, capsys, monkeypatch, tmp_path, script, text):
    path = tmp_path / "figures.json"
    path.write_text(text)
    words = [str(path)] if script == "sync_chart" else ["--from", str(path)]
    assert f"{path} holds no " in refused(getattr(bench, script), words, capsys, monkeypatch)


def test_the_list_of_cases_needs_no_cluster(bench, capsys):
    assert bench.bench_sync.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == "across-7b two 7B dense, 1 to 1, a GPU each".split()


def test_cases_on_cpus_and_gpus_do_not_mix(bench, capsys):
    assert bench.bench_sync.main(["--case", "across-7b", "--case", "cpu-across-7b"]) == 2
    assert "do not go into one run" in capsys.readouterr().err


# Traces.


class Counter:
    def add(self, amount):
        if amount < 0:
            raise ValueError(amount)

        return amount + 1


def test_wrapped_calls_are_marked_whatever_they_end_in_and_return_what_they_did(bench):
    class Marked(Counter):
        pass

    marks = bench.trace_sync.Marks()
    marks.wrap(Marked, "add", lambda own, amount: f"adds {amount}")
    assert Marked().add(1) == 2
    with pytest.raises(ValueError, match="-3"):
        Marked().add(-3)

    found = marks.take()
    assert [mark.what for mark in found] == ["adds 1", "adds -3"]
    assert all(mark.nanoseconds >= 0 for mark in found)
    assert found[0].began <= found[1].began
    assert marks.take() == []


def test_all_that_an_actor_marks_is_there(bench, monkeypatch):
    found = []
    monkeypatch.setattr(
        bench.trace_sync.Marks, "wrap", lambda marks, owner, method, name: found.append((owner, method))
    )
    bench.trace_sync.TracedActor.mark(SimpleNamespace())
    assert len(found) > 10
    assert [method for owner, method in found if not callable(getattr(owner, method, None))] == []


def test_marks_of_all_are_in_one_order_from_where_the_sync_began(bench):
    mark = bench.trace_sync.Mark
    rows = bench.trace_sync._merge(
        [[mark("sync()", 1_000_000, 9_000_000)], [mark("begins", 3_500_000, 250_000)]], 1_000_000
    )
    assert rows == [
        {"who": "driver", "what": "sync()", "at": 0.0, "milliseconds": 9.0},
        {"who": "actor 0", "what": "begins", "at": 2.5, "milliseconds": 0.25},
    ]


def test_a_devices_work_is_added_up_by_kernel_the_longest_first(bench):
    mark = bench.trace_sync.Mark
    found = [mark("walk", 2_000_000, 1_000_000), mark("copy", 1_000_000, 4_000_000), mark("walk", 6_000_000, 2_000_000)]
    assert bench.trace_sync._by_kind(3, found, 1_000_000) == [
        {"actor": 3, "what": "copy", "count": 1, "milliseconds": 4.0, "first": 0.0, "last": 4.0},
        {"actor": 3, "what": "walk", "count": 2, "milliseconds": 3.0, "first": 1.0, "last": 7.0},
    ]


def test_a_trace_that_needs_more_gpus_says_so(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.trace_sync.torch.cuda, "device_count", lambda: 1)
    assert bench.trace_sync.main(["--case", "across-7b"]) == 2
    assert capsys.readouterr().err == "trace_sync: across-7b needs 2 GPUs, 1 are here\n"


# Faults.


@pytest.mark.anyio
async def test_a_strike_falls_while_the_second_steps_bytes_are_on_their_way_and_once(bench, monkeypatch, tmp_path):
    source, found = torch.arange(64.0), torch.zeros(64)
    shards = [[Shard("w", view, (0,), (64,))] for view in (source, found)]
    crew = Crew(shards, planned(shards[:1], shards[1:], chunk_bytes=64, bucket_bytes=64), wires=Wires())
    await crew.sync(1, connect=True)
    assert torch.equal(source, found)

    queue, struck = bench.gpu_faults.Steps.queue, []
    witness = tmp_path / "witness"
    # At once, where the timer would be started: bytes have set out by then.
    monkeypatch.setattr(bench.gpu_faults.Blow, "begin", lambda blow: blow._strike())
    monkeypatch.setattr(bench.gpu_faults.os, "kill", lambda *blow: struck.append((*blow, witness.read_text())))
    bench.gpu_faults.StruckActor.arm(SimpleNamespace(_device=torch.device("cpu")), "kill", str(witness))
    found.zero_()
    await crew.sync(2, connect=False)
    assert struck == [(os.getpid(), signal.SIGKILL, "true")]
    assert bench.gpu_faults.Steps.queue is queue
    assert torch.equal(source, found)


def test_faults_on_fewer_gpus_than_it_takes_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.gpu_faults.torch.cuda, "device_count", lambda: 1)
    assert bench.gpu_faults.main([]) == 2
    assert capsys.readouterr().err == "gpu_faults: needs 2 GPUs, 1 are here; --device cpu needs none\n"
