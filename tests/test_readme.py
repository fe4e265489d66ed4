"""What the READMEs say can be typed: paths exist, flags are known, and the code runs, from its data to its actions."""

import re
from pathlib import Path

import pytest
from worlds import babble

import diffpolicy as dp
from diffpolicy.cli import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "scripts/benchmarks/README.md", "scripts/reproduce/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_the_repository_that_a_readme_names_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w/.-])(?:diffpolicy|envs|scripts|tests|results)/[\w./-]*\w/?", text)
    assert len(named) > 5
    missing = {name for name in named if not any((top / name).exists() for top in (ROOT, (ROOT / page).parent))}
    assert not missing


def test_every_flag_that_a_readme_gives_a_verb_is_one(capsys):
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    found = set()
    for verb in VERBS:
        spans = re.findall(rf"`(?:diffpolicy )?{verb} ([^`#]+)`", pages) + re.findall(
            rf"diffpolicy {verb} ([^`#\n]+)", pages
        )
        found |= {(verb, flag) for span in spans for flag in re.findall(r"(?<!\S)--[a-z0-9.-]+", span)}
    assert len(found) > 20 and ("train", "--flow") in found
    for verb in {verb for verb, _ in found}:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        known = set(re.findall(r"(?<![\w-])--[a-z0-9.-]+", capsys.readouterr().out))
        assert {flag for of, flag in found if of == verb} <= known


def test_the_code_of_train_and_act_runs_in_their_order(tmp_path, monkeypatch):
    """With fewer steps, a smaller network and babble for demonstrations of the maze that is played."""
    monkeypatch.chdir(tmp_path)
    dp.save(babble({"observation": 4, "achieved_goal": 2, "desired_goal": 2}), Path("runs/quickstart/demos"))
    train_it, act = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    for said, small in (("20_000", "6"), ("(64, 128, 256)", "(16, 16)"), ("episodes=100", "episodes=1")):
        assert said in train_it + act
        train_it, act = train_it.replace(said, small), act.replace(said, small)
    names: dict = {}
    exec(train_it, names)
    assert names["step"] == 6
    exec(act, names)
    assert names["action"].shape == (2,) and names["report"].seeds == (100_000, 100_000)
