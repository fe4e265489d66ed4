"""scripts/reproduce/steps.py: which combinations it plays, and what it claims of reports whose answer is known."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from diffpolicy.report import wilson

PATH = Path(__file__).parents[1] / "scripts" / "reproduce" / "steps.py"


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("reproduce_steps", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def report(successes: list[int]) -> dict:
    rate = wilson(sum(successes), len(successes))
    return {
        "env_id": "Maze", "env_kwargs": {}, "versions": {},
        "episodes": len(successes), "seeds": [0, len(successes) - 1],
        "success": {"rate": rate.value, "ci95": [rate.low, rate.high]}, "score": None,
        "by_episode": {"success": [float(s) for s in successes], "score": [0.8 + 0.1 * s for s in successes]},
    }  # fmt: skip


def test_undefined_combinations_are_not_played_and_those_of_the_claims_come_first(steps):
    cells = steps.cells()
    names = [cell.name for cell in cells]
    assert names[:4] == ["flow-euler-10", "mip-mip-2", "epsilon-ddim-10", "distilled-one_step-1"]
    assert len(set(names)) == len(names) == 44
    assert not any(cell.objective == "epsilon" and cell.k == 1 for cell in cells)
    assert {cell.k for cell in cells if cell.sampler == "heun"} == {3, 5}
    assert [cell.config.steps for cell in cells if cell.name == "flow-heun-5"] == [3]
    assert [cell.sampler for cell in cells if cell.objective == "flow" and cell.k == 1] == ["euler"]
    assert {cell.k for cell in cells if cell.objective == "mip"} == {1, 2}
    episodes = {cell.k: (cell.episodes(300), cell.episodes(40)) for cell in cells}
    assert episodes == {20: (100, 40), 100: (50, 40)} | dict.fromkeys((1, 2, 3, 5, 10), (300, 40))
    long, dear = (next(cell for cell in cells if cell.k == k) for k in (10, 100))
    assert [long.counts({"episodes": n}, 300) for n in (299, 300, 301)] == [False, True, False]
    assert [dear.counts({"episodes": n}, 300) for n in (49, 50, 100, 300, 301)] == [False, True, True, True, False]


def test_the_table_of_known_reports_has_their_rates_and_paired_differences_and_is_drawn(steps, tmp_path, capsys):
    played = {
        "flow-euler-10": [1, 1, 1, 0] * 10,
        "mip-mip-2": [1, 1, 1, 0] * 10,
        "distilled-one_step-1": [0, 1, 1, 0] * 10,
    }
    folder = tmp_path / "maze" / "cells"
    folder.mkdir(parents=True)
    for name, successes in played.items():
        (folder / f"{name}.json").write_text(json.dumps(report(successes)))
    steps.summarise(tmp_path, 40, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "steps.json").read_text())["maze"]
    assert {(c["objective"], c["K"]): c["success"]["rate"] for c in found["cells"]} == {
        ("flow", 10): 0.75, ("mip", 2): 0.75, ("distilled", 1): 0.5
    }  # fmt: skip
    same, _, worse, score = found["claims"]
    assert (same["few"], same["difference"], same["ci95"], same["holds"]) == ("mip-mip-2", 0.0, [0.0, 0.0], True)
    assert (worse["few"], worse["difference"], worse["holds"]) == ("distilled-one_step-1", -0.25, False)
    assert (score["metric"], score["few"], score["holds"]) == ("score", "distilled-one_step-1", True)
    assert score["difference"] == pytest.approx(-0.025)
    assert found["cells"][0]["succeeded"] == "0110" * 10
    assert (tmp_path / "out" / "steps.png").stat().st_size > 10_000
    assert "| flow | euler |  |  |  |  | 0.75 [0.60, 0.86] |  |  |" in capsys.readouterr().out
    for other in (20, 300):  # neither longer nor shorter cells count
        steps.summarise(tmp_path, other, tmp_path / "none")
    assert not (tmp_path / "none").exists()
