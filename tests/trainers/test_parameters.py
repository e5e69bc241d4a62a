"""Ranks, alphas and rates by component and block, from the preset to the file and to the step that is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora_core import Adapter, read_adapter
from lora_core.errors import ConfigError
from tests.trainers.runs import base_folder, config, pictures
from trainers import presets
from trainers.config import TrainConfig
from trainers.dreambooth import train


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bases")
    return {family: base_folder(tmp / family, family) for family in ("sd1", "sdxl")}


def trained(settings: TrainConfig) -> Adapter:
    return read_adapter(train(settings))


def moved(adapter: Adapter, path: str) -> float:
    """The longest way a weight of the up factor, which begins at zero, has gone."""
    return float(adapter.deltas[path].tensors()["up"].abs().max())


def first(adapter: Adapter, beginning: str) -> str:
    return next(path for path in adapter.deltas if path.startswith(beginning))


def test_ranks_alphas_and_rates_of_a_preset(tmp_path: Path, bases: dict[str, Path]) -> None:
    """One step of AdamW moves every weight by its rate, whatever its gradient."""
    pictures(tmp_path / "images", 2, side=128)
    settings = config(
        tmp_path,
        bases["sdxl"],
        data={"resolution": 128},
        lora={
            "ranks": {"unet.down.1": 2, "unet.mid": 0, "text_encoder": 3, "text_encoder_2.layers.1": 5},
            "alphas": {"unet.down.1": 1.0, "text_encoder_2": 7.0},
        },
        train={
            "steps": 1,
            "batch_size": 1,
            "learning_rate": 1e-3,
            "text_encoder_learning_rate": 2e-3,
            "text_encoder_2_learning_rate": 3e-3,
            "rates": {"unet.up": 4e-3, "unet.up.1": 5e-3, "text_encoder_2.layers.1": 6e-3},
            "weight_decay": 0.0,
        },
    )
    assert TrainConfig.model_validate(presets.tomllib.loads(presets.dump(settings))) == settings
    adapter = trained(settings)
    shape = {
        path: (len(d.tensors()["down"]), float(d.tensors()["alpha"])) for path, d in adapter.deltas.items()
    }
    assert {s for p, s in shape.items() if p.startswith("unet.down_blocks.1.")} == {(2, 1.0)}
    assert {s for p, s in shape.items() if p.startswith("unet.up_blocks.")} == {(4, 6.0)}
    assert {s for p, s in shape.items() if p.startswith("text_encoder.")} == {(3, 6.0)}
    second = {p.split(".layers.")[1][0]: s for p, s in shape.items() if p.startswith("text_encoder_2.")}
    assert second == {"0": (4, 7.0), "1": (5, 7.0)}
    assert not [path for path in shape if path.startswith("unet.mid_block")]
    for beginning, rate in (
        ("unet.down_blocks.2.", 1e-3),
        ("unet.up_blocks.0.", 4e-3),
        ("unet.up_blocks.1.", 5e-3),
        ("text_encoder.text_model.encoder.layers.0.", 2e-3),
        ("text_encoder_2.text_model.encoder.layers.0.", 3e-3),
        ("text_encoder_2.text_model.encoder.layers.1.", 6e-3),
    ):
        assert moved(adapter, first(adapter, beginning)) == pytest.approx(rate, rel=1e-3), beginning


def test_one_text_encoder_may_be_left_out(tmp_path: Path, bases: dict[str, Path]) -> None:
    pictures(tmp_path / "images", 1, side=128)
    settings = config(
        tmp_path,
        bases["sdxl"],
        data={"resolution": 128},
        train={"steps": 1, "batch_size": 1, "text_encoder_2_learning_rate": 0.0},
    )
    assert trained(settings).components() == ("unet", "text_encoder")


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"lora": {"ranks": {"vae": 2}}}, 'lora.ranks: "vae" begins with no component'),
        ({"lora": {"ranks": {"unet.middle": 2}}}, '"middle" is no block'),
        ({"lora": {"ranks": {"text_encoder": 0}}}, "set train.text_encoder_learning_rate = 0"),
        ({"train": {"rates": {"unet": 1e-4}}}, "the rate of unet is train.learning_rate"),
        ({"train": {"rates": {"unet.mid": 0.0}}}, "train.rates.unet.mid = 0.0 must be more than 0"),
        (
            {"train": {"rates": {"text_encoder.layers.0": 1e-4}, "text_encoder_learning_rate": 0.0}},
            "text_encoder is not trained at all",
        ),
        # what only the base model can tell
        ({"lora": {"alphas": {"text_encoder_2": 2.0}}}, "this training has unet, text_encoder alone"),
        ({"train": {"text_encoder_2_learning_rate": 1e-4}}, "text_encoder_2_learning_rate is about text_encoder_2"),
        ({"train": {"rates": {"unet.down.3": 1e-4}}}, 'The rate of "unet.down.3" is of no use'),
        ({"lora": {"ranks": {"unet.down.7": 2}}}, 'block_ranks "down.7" holds none of'),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(
    tmp_path: Path, bases: dict[str, Path], tables: dict[str, Any], sentence: str
) -> None:
    pictures(tmp_path / "images", 1)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        train(config(tmp_path, bases["sd1"], **tables))
