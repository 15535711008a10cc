"""``sllm-vllm simulate``: what it prints, and what it does when something fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sllm_vllm.cli import simulate as command
from sllm_vllm.cli.simulate import OURS, Options, run_simulation
from sllm_vllm.errors import ConfigError
from sllm_vllm.simulate.decisions import Decisions, crowded, growth_rows, measure, with_models, with_nodes
from sllm_vllm.simulate.hardware import ModelClass
from sllm_vllm.simulate.policy import SchedulingPolicy
from sllm_vllm.simulate.presets import BIG, HERE
from tests.simulate.scripted import Scripted
from tests.support.cases import every_case

SHORT = Options(preset="here", seeds=2, requests=20, validate=True)


def with_policy(monkeypatch: pytest.MonkeyPatch, policy: SchedulingPolicy) -> None:
    """Make it the only one that is known."""

    def known(classes: Mapping[str, ModelClass], seed: int) -> dict[str, Callable[[], SchedulingPolicy]]:
        return {OURS: lambda: policy}

    monkeypatch.setattr(command, "policies", known)


def test_table_has_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_simulation(SHORT) == 0
    told = capsys.readouterr().out
    assert [name for name in command.policies(HERE.classes(), 0) if name not in told] == []


def test_others_are_held_against_ours_if_it_is_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    for policies, is_told in (((OURS, "shepherd"), True), (("shepherd",), False)):
        run_simulation(Options(preset="here", policies=policies, seeds=2, requests=20))
        assert ("over ours" in capsys.readouterr().out) is is_told


def test_json_has_the_seeds_and_their_spread(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_simulation(Options(preset="here", policies=(OURS,), seeds=2, requests=20, json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["preset"], told["requests"], list(told["policies"])) == ("here", 20, [OURS])
    assert len(told["policies"][OURS]["seeds"]) == 2
    assert told["policies"][OURS]["spread"]["num_lost"] == {"mean": 0.0, "min": 0, "max": 0}


def test_rate_is_the_one_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    durations = []
    for rate in (0.1, 1.0):
        run_simulation(Options(preset="here", policies=(OURS,), seeds=1, requests=50, rate=rate, json=True))
        told = json.loads(capsys.readouterr().out)
        durations.append(told["policies"][OURS]["seeds"][0]["duration_s"])
    assert durations[0] > 2 * durations[1]


def test_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"2023-11-16 18:15:0{second},10,10" for second in range(5)]
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    run_simulation(Options(preset="here", policies=(OURS,), seeds=1, trace=tmp_path / "trace.csv", json=True))
    assert json.loads(capsys.readouterr().out)["policies"][OURS]["seeds"][0]["num_requests"] == 5


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_simulation(Options(preset="here", policies=(OURS,), seeds=1, requests=20, png=tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_lost_requests_are_told_with_their_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_policy(monkeypatch, Scripted(lambda event, now_s: []))
    assert run_simulation(SHORT) == 1
    assert "ours with seed 0, ours with seed 1" in capsys.readouterr().err


def test_failure_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(event: object, now_s: float) -> list[object]:
        raise AssertionError("broken")

    with_policy(monkeypatch, Scripted(fail))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="broken"):
        run_simulation(SHORT)
    assert "failed with seed 0 at 0.000 s: --preset here --policies ours --requests 20" in capsys.readouterr().err


@every_case("options", [Options(preset="huge"), Options(policies=("best",))])
def test_unknown_names_are_refused(options: Options) -> None:
    with pytest.raises(ConfigError, match="choose"):
        run_simulation(options)


def test_decisions_are_counted_by_their_kind() -> None:
    found = measure(HERE, 20, seed=1)
    assert len(found.seconds["RequestArrived"]) == 20
    assert len(found.set_up["ModelDeployed"]) == 3
    assert found.num == sum(len(values) for values in found.seconds.values())
    assert found.mean_s == found.computed_s / found.num > 0


def test_number_of_models_grows_and_the_nodes_do_not() -> None:
    grown = with_models(HERE, 50)
    assert (len(grown.classes()), grown.num_nodes) == (50, HERE.num_nodes)


def test_each_node_has_as_much_however_many_there_are() -> None:
    fewer = with_nodes(BIG, 10)
    assert (fewer.num_nodes, len(fewer.classes())) == (10, 100)
    assert fewer.traffic.rate == pytest.approx(10.0)


def test_crowded_cluster_refuses_nobody_and_everybody_waits() -> None:
    found = measure(crowded(replace(HERE, traffic=replace(HERE.traffic, rate=10.0))), 60, seed=1)
    assert found.num_waiting_max > 30
    assert len(found.seconds["FirstByte"]) == 60


def test_growth_is_held_against_the_logarithm() -> None:
    grown = {size: Decisions({"Ticked": [us / 1e6]}, {}, us / 1e6) for size, us in ((100, 20.0), (10_000, 30.0))}
    assert [(row["slower"], row["logarithm"]) for row in growth_rows(grown, "models")] == [
        ("1.00", "1.00"),
        ("1.50", "2.00"),
    ]


def test_decisions_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sllm_vllm.simulate.decisions.NUM_MODELS", (2, 4))
    monkeypatch.setattr("sllm_vllm.simulate.decisions.NUM_NODES", (2, 3))
    assert run_simulation(Options(preset="here", requests=20, decisions=True)) == 0
    assert "RequestArrived" in capsys.readouterr().out
    assert run_simulation(Options(preset="here", requests=20, decisions=True, json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    assert [list(told[part]) for part in ("loads", "by_models", "by_nodes")] == [
        ["as it is", "crowded"],
        ["2", "4"],
        ["2", "3"],
    ]
