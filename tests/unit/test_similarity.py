"""What is said of sources by the counts of their tokens."""

import json

import numpy as np
import pytest

from megatron_dynmix.similarity.findings import average_linkage, findings

NAMES = ["chat", "law", "math", "math_again", "code"]
TOKENS = 40_000


def counts(seed, *, copies=((3, 2),), flat=()):
    """Draw two halves of counts of 3 layers x 8 experts; copies have the distribution of another source."""
    rng = np.random.default_rng(seed)
    load_DLE = rng.dirichlet(np.ones(8), (len(NAMES), 3))
    for copy, of in copies:
        load_DLE[copy] = load_DLE[of]
    load_DLE[:, list(flat)] = 1 / 8
    return np.array(
        [[[rng.multinomial(TOKENS, load_E) for load_E in load_LE] for load_LE in load_DLE] for _ in range(2)]
    )


SIZES = np.array([40, 10, 20, 20, 10])


def test_copies_are_one_kind_and_share_what_one_would_get():
    found = findings(NAMES, counts(1), SIZES)
    assert found.kinds == [["math", "math_again"], ["chat"], ["law"], ["code"]]
    weights = dict(zip(NAMES, found.weights["uniqueness"], strict=True))
    assert weights["math"] == pytest.approx(weights["math_again"], rel=0.05)
    assert weights["math"] + weights["math_again"] == pytest.approx(weights["code"], rel=0.5)
    assert {found.joints[0].left, found.joints[0].right} == {(2,), (3,)}
    assert sorted(found.joints[-1].left + found.joints[-1].right) == list(range(5))


def test_rules_begin_with_what_they_would_begin_with():
    found = findings(NAMES, counts(1), SIZES)
    assert found.weights["uniform"] == [0.2] * 5
    assert found.weights["data-size"] == pytest.approx([0.4, 0.1, 0.2, 0.2, 0.1])
    for weights in found.weights.values():
        assert sum(weights) == pytest.approx(1)


def test_samples_of_one_distribution_are_one_kind_and_no_layer_tells_them_apart():
    found = findings(NAMES, counts(2, copies=[(d, 0) for d in range(1, 5)]), SIZES)
    assert not found.likeness.told_apart and len(found.kinds) == 1
    assert not any(layer.told_apart for layer in found.layers)
    assert found.weights["uniqueness"] == pytest.approx([0.2] * 5)


def test_the_layers_that_separate_come_first():
    found = findings(NAMES, counts(3, flat=[1]), SIZES)
    assert [layer.layer for layer in found.layers][-1] == 1 and not found.layers[-1].told_apart
    assert found.layers[0].separation > 10 * max(found.layers[-1].separation, 0.1)


def test_the_error_of_a_distance_is_its_spread_over_samples():
    """Of a pair far apart, of which many samples are drawn."""
    rng = np.random.default_rng(5)
    load_DLE = rng.dirichlet(np.ones(8), (2, 1))
    distances, errors = [], []
    for _ in range(200):
        drawn = [
            [[rng.multinomial(3000, load_E) for load_E in load_LE] for load_LE in load_DLE] for _ in "ab"
        ]
        found = findings(["one", "other"], np.array(drawn), np.array([1, 1])).likeness
        distances.append(found.distance_DD[0, 1])
        errors.append(found.error_DD[0, 1])
    assert np.median(errors) == pytest.approx(np.std(distances), rel=0.35)


def test_the_tree_of_points_on_a_line():
    place_D = np.array([0.0, 1.0, 5.0, 5.5])
    joints = average_linkage(np.abs(place_D[:, None] - place_D))
    assert [(joint.left, joint.right) for joint in joints] == [((2,), (3,)), ((0,), (1,)), ((2, 3), (0, 1))]
    assert [joint.height for joint in joints] == [0.5, 1.0, pytest.approx(4.75)]


def test_two_sources_and_json_that_reads_back():
    both = counts(1)[:, :2]
    content = findings(NAMES[:2], both, SIZES[:2]).to_json()
    assert "at least 3 sources" in content["refusals"]["gate-load"]
    assert content["weights"]["uniqueness"] == [0.5, 0.5]
    assert json.loads(json.dumps(content, allow_nan=False)) == content | {
        "tree": [{"left": [0], "right": [1], "height": content["tree"][0]["height"]}]
    }


def test_a_source_without_tokens_is_refused():
    nothing = counts(1)
    nothing[1, 2] = 0
    with pytest.raises(ValueError, match="halves"):
        findings(NAMES, nothing, SIZES)
