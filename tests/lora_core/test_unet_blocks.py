"""Block names and expressions: which layers they hold for, and that none from elsewhere can take hours."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.burn import _tied
from lora_core.errors import ConfigError
from lora_core.mix import AdapterWeight
from lora_core.parameters import parse_parameters
from lora_core.unet_blocks import block_pattern, matches

PATH = "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0"
USUAL = [
    "attn1",
    r"attn[12]\.to_(q|k|v)",
    r"(down|up)_blocks\.[01]\.(attentions|resnets)",
    r"down_blocks\.\d+\.attentions\.\d+\..*to_out",
    r"down.*attn.*to_(q|out)",
    r"(?i)ATTN1",
    r"to_q|to_k|to_v|to_out|ff|proj_in|proj_out|conv1|conv2|conv_shortcut|time_emb|a|b|c|d|e|f|g",
]
# Each is tried in more than 2^30 ways on PATH, which it is not found in: hours, if it was run.
HOURS = [
    r"(\w+)+!",
    r"(\w|.)*!",
    r"(\w+|x){30}!",
    "(?:.|.)" * 40 + "!",
    ".?" * 40 + r"[!]",
    ".*" * 8 + r"[!]",
    ".{0,60}" * 8 + r"[!]",
    ".*?" * 8 + r"[!]",
    r"(?x)(\w+) *!",
    "(?x)(\\w+)# a comment\n*!",
    r"(\w+)(?#a comment)*!",
    r"((((\w+)+)+)+)+!",
    "(" * 20 + r"\w+" + ")+" * 20 + "!",
    r"(?:(\w)?)*!",
    "^(?=" + r".*" * 8 + "[!])",
]


@pytest.mark.parametrize("key", USUAL)
def test_what_people_write_is_taken_and_found_also_when_tied_to_a_block(key: str) -> None:
    assert matches(key, PATH) is (re.search(key, PATH) is not None)
    assert matches(_tied(key, r"^down_blocks\.2\."), PATH) is matches(key, PATH)
    assert not matches(_tied(key, r"^up_blocks\.[0-9]+\."), PATH)


@pytest.mark.parametrize("key", HOURS)
def test_an_expression_that_runs_for_hours_is_refused_before_it_is_run(key: str) -> None:
    re.compile(key)  # it is one
    with pytest.raises(ConfigError, match="can take very long"):
        matches(key, PATH)


def test_a_pictures_own_expression_is_refused_when_it_is_worn() -> None:
    exact = r'{"prompt": "", "negative_prompt": "", "lora_hashes": {}, "loras": {"ink": {"blocks": {"(\\w+)+!": 1}}}}'
    quoted = exact.replace("\\", "\\\\").replace('"', '\\"')
    loras = parse_parameters(f'\nSteps: 1, Sampler: DDIM, Seed: 1, Exact: "{quoted}"')["loras"]
    assert loras["ink"]["blocks"] == {r"(\w+)+!": 1}
    with pytest.raises(ConfigError, match="can take very long"):
        AdapterWeight.parse("ink", loras["ink"])


def test_as_many_blocks_as_are_kept_compiled() -> None:
    with pytest.raises(ConfigError, match="at most 1024"):
        AdapterWeight.parse("ink", {"blocks": {f"x{i}": 1.0 for i in range(1025)}})


pieces = st.sampled_from(
    ["a", ".", r"\w", "[^!]", "*", "+", "?", "{2,}", "{3}", "(", ")", "|", "(?:", "(?=", r"\d+", "^", "*?"]
)


@given(st.lists(pieces, min_size=1, max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_whatever_is_taken_ends(text: str) -> None:
    """One that was taken and ran away would run into the suite's own limit. It is what Python makes of it."""
    try:
        pattern = block_pattern(text)
    except ConfigError:
        return
    assert pattern.pattern == text
    assert matches(text, PATH) is (pattern.search(PATH) is not None)
