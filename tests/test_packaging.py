"""What a wheel holds: an editable install, as tests have, finds a subpackage that the wheel lacks."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_of_the_tree_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "diffpolicy").rglob("*.py")}
    assert set(listed) == there | {"diffpolicy_envs"}
    assert {path.parent for path in (ROOT / "envs").rglob("*.py")} == {ROOT / "envs"}
