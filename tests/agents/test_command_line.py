"""`diffpolicy train --agent`: each has its own settings, which a resumed run takes up again."""

import json
import math

import numpy as np
import pytest
from worlds import bandit

from diffpolicy.cli import main
from diffpolicy.data import store
from diffpolicy.policy import Policy
from diffpolicy.tables import AGENTS

SMALL = ["--denoiser.network", "mlp", "--denoiser.hidden-dim", "8", "--denoiser.depth", "1"]
HORIZONS = ["--horizon", "2", "--n-obs-steps", "1", "--n-action-steps", "2"]


@pytest.fixture
def dataset(tmp_path) -> str:
    return str(store.save(bandit(count=12, steps=3), tmp_path / "data"))


@pytest.mark.parametrize("agent", [name for name in AGENTS if name != "bc"])
def test_each_agent_trains_and_resumes_with_its_own_settings(tmp_path, dataset, agent):
    run = tmp_path / "run"
    argv = ["train", "--agent", agent, "--dataset", dataset, "--out", str(run), *SMALL, *HORIZONS]
    own = ["--critic.hidden", "8", "8", "--td.gamma", "0.5", "--td.rewards.scale", "2", "--batch-size", "4"]
    assert main([*argv, *own, "--selection.samples", "3", "--steps", "2"]) == 0
    assert main(["train", "--dataset", dataset, "--out", str(run), "--resume", "--steps", "3"]) == 0
    arguments = json.loads((run / "config.json").read_text())["arguments"]
    assert (arguments["agent"], arguments[agent]["critic"]["hidden"]) == (agent, [8, 8])
    assert (arguments[agent]["td"]["gamma"], arguments[agent]["td"]["rewards"]["scale"]) == (0.5, 2.0)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    for name in ("loss", "q", "q_spread", "td_loss", "validation/q_data", "validation/advantage/50"):
        assert math.isfinite(last[name])
    policy = Policy.load(run)
    assert policy.selection is not None
    assert policy.selection.config.samples == 3
    assert policy.predict(np.zeros(1, np.float32))[0].shape == (1,)


def test_unknown_agents_foreign_settings_and_impossible_choices_are_refused(tmp_path, dataset, capsys):
    argv = ["train", "--dataset", dataset, "--out", str(tmp_path / "run"), *SMALL, *HORIZONS, "--steps", "1"]
    for more, words in (
        (["--agent", "sac"], "there is no agent 'sac'"),
        (["--agent", "idql", "--selection.samples", "0"], "at least 1 sample"),
        (["--agent", "idql", "--critic.members", "0"], "at least 1 critic"),
        (["--agent", "qc", "--backup-samples", "0"], "backup_samples is 0"),
        (["--agent", "idql", "--td.gamma", "1.5"], "wanted both in [0, 1]"),
        (["--agent", "dql", "--td.rewards.kind", "return_range", "--dataset", flat(tmp_path)], "use plain"),
    ):
        assert main([*argv, *more]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*argv, "--agent", "bc", "--tau", "0.9"])
    assert main([*argv, "--agent", "idql", "--batch-size", "4"]) == 0
    assert main(["train", "--dataset", dataset, "--out", str(tmp_path / "run"), "--resume", "--agent", "dql"]) == 2
    assert "another agent" in capsys.readouterr().err


def flat(tmp_path) -> str:
    return str(store.save(bandit(count=4, gap=0.0), tmp_path / "flat"))
