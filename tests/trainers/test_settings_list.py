"""`--list-settings` shows every setting there is, with the default that a preset without it has."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

import launch
from trainers.config import DatasetSettings, TrainConfig
from trainers.config_table import Table

LEAST: dict[str, Any] = {"name": "x", "data": {"images": "photos"}}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert launch.main(["--list-settings", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_setting_is_listed_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys)
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    tables: list[type[Table]] = [TrainConfig, *TrainConfig.tables().values(), DatasetSettings]
    inside = {*TrainConfig.tables(), "dataset"}
    assert sorted(names) == sorted(k for table in tables for k in table.model_fields if k not in inside)
    meanings = [line for line in lines if line.startswith("      ")]
    assert all(len(line) <= 110 for line in meanings)
    assert len(meanings) >= len(names)


def test_defaults_are_those_of_a_preset_that_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    made = TrainConfig.model_validate(LEAST)
    for name in TrainConfig.tables():
        title, *lines = shown(capsys, name)
        assert title.startswith(f"[{name}]  ")
        said = {line.strip() for line in lines if " = " in line and line.startswith("  ") and line[2] != " "}
        plain = tomllib.loads("\n".join(line.partition("  of ")[0] for line in said))
        for key, value in plain.items():
            found = getattr(getattr(made, name), key)
            assert value == (list(found) if isinstance(found, tuple) else found), f"{name}.{key}"


def test_a_wrong_table_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--list-settings", "trian"]) == 2
    assert capsys.readouterr().err == 'A preset has no table [trian]. Did you mean "train"?\n'
    assert 'kind = "lora"  of lora, loha, lokr' in "\n".join(shown(capsys, "lora"))
