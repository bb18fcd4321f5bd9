"""The recipe for another family in docs/convert.md, as it stands there; the page of families; and servers."""

import re
import runpy
from pathlib import Path

import pytest

from megatron_dynmix.config import hugging_face_defaults
from megatron_dynmix.config.hugging_face import model_settings
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.families import FAMILIES
from tests import published_models as published
from tests.deepseek_models import DEEPSEEK_V2_LITE, DEEPSEEK_V3

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/convert.md").read_text()


@pytest.fixture
def forget():
    """What is known of families is kept: without the one that is made up."""
    hugging_face_defaults._table.cache_clear()
    yield
    hugging_face_defaults._table.cache_clear()


def test_the_recipe_for_another_family_works_as_documented(forget, monkeypatch, tmp_path):
    family, test = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names = {}
    exec(family, names)
    (name, value) = re.search(r'`"(\w+)": heron\.(\w+)`', GUIDE).groups()
    monkeypatch.setitem(FAMILIES, name, names[value])
    exec(test, names)
    (run,) = (names[found] for found in names if found.startswith("test_"))
    run(tmp_path)
    assert max(map(len, (family.splitlines(), test.splitlines()))) <= 40, "a screen"


def test_the_page_of_families_is_made_from_the_code():
    page = runpy.run_path(str(ROOT / "tools/family_table.py"))["page"]()
    assert (ROOT / "docs/families.md").read_text() == page, "python tools/family_table.py docs/families.md"
    for model_type, family in FAMILIES.items():
        assert f"| {family.title} | `{model_type}` |" in page
        assert all(only.why for only in family.dialect.must.values()), model_type


SERVED = {
    "glm-4.5": published.GLM_4_5,
    "glm-4.7-flash": published.GLM_4_7_FLASH,
    "kimi-k2": published.KIMI_K2,
    "moonlight": published.MOONLIGHT,
    "minimax-m2": published.MINIMAX_M2,
    "dots.llm1": published.DOTS_LLM1,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v3": DEEPSEEK_V3,
}
JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
EXPERT = re.compile(r"model\.layers\.\d+\.(\w+)\.experts\.\d+\.(\w+)\.weight")
OTHERS = re.compile(
    r"(model\.embed_tokens|model\.norm|lm_head)\.weight|model\.layers\.\d+\.(\w+_layernorm\.weight|"
    r"self_attn\.(\w+)\.(weight|bias)|mlp\.(gate|up|down)_proj\.weight|"
    r"mlp\.shared_experts\.(gate|up|down)_proj\.weight|"
    r"(mlp|block_sparse_moe)\.gate\.weight|(mlp\.gate|block_sparse_moe)\.e_score_correction_bias)"
)
ATTENTION = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    *("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"),
}


@pytest.mark.parametrize("name", SERVED)
def test_names_are_those_that_servers_load(name):
    """As vLLM's and SGLang's models glm4_moe, deepseek_v2, dots1 and minimax_m2 take them from a folder.

    Routed experts one by one, and by the names that their tables of experts are made with; all other names
    those of modules, of which they join some.
    """
    config = {**SERVED[name], "num_hidden_layers": 4}
    parts = (
        ("block_sparse_moe", {"w1", "w2", "w3"})
        if name == "minimax-m2"
        else ("mlp", {*JOINED[3:], "down_proj"})
    )
    experts = set()
    for tensor in weight_map(model_settings(config), config).hf_shapes:
        if match := EXPERT.fullmatch(tensor):
            experts.add(match.groups())
        else:
            match = OTHERS.fullmatch(tensor)
            assert match and (match[3] is None or match[3] in ATTENTION), tensor
    assert experts == {(parts[0], part) for part in parts[1]}


def test_servers_cut_the_experts_of_granite_themselves():
    """Their models granitemoe read these three names, and all others as of Mixtral."""
    config = {**published.GRANITE_1B_A400M, "num_hidden_layers": 4}
    block = re.compile(r"model\.layers\.\d+\.block_sparse_moe\.(.*)")
    of_moe = set()
    for tensor in weight_map(model_settings(config), config).hf_shapes:
        if match := block.fullmatch(tensor):
            of_moe.add(match[1])
        else:
            match = OTHERS.fullmatch(tensor)
            assert match and (match[3] is None or match[3] in ATTENTION), tensor
    assert of_moe == {"router.layer.weight", "input_linear.weight", "output_linear.weight"}
