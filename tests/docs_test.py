"""What the README and docs/ tell people to type exists."""

import pathlib
import re

import pytest

from audiolm_jax.cli import _build_parser
from audiolm_jax.config import flat, load_config, shipped_configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_fields_files_and_commands_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--config=([a-z]\w*)\b(?!\})", text)) - {"recipe"}
    assert named <= set(shipped_configs())
    known = {field for name in shipped_configs() for field in flat(load_config(name))}
    assert set(re.findall(r"--config\.([a-z][\w.]*)=", text)) <= known
    for path in re.findall(r"\b(?:launch|configs|docs|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    commands = next(action.choices for action in _build_parser()._actions if action.dest == "command")
    assert set(re.findall(r"(?<![\w/`.])audiolm ([a-z][\w-]*)", text)) <= set(commands)
