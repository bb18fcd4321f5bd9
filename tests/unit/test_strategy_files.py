"""What strategies are given by file: every bad one is refused by one message."""

import json

import numpy as np
import pytest
from run_fixtures import BATCH, fake_run

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.training.mix_setup import resolve_files

SOURCES = ["chat", "math", "code"]
LOSSES = {"code": 1.5, "chat": 2, "math": 0.0}
VECTORS = {"chat": [1, 0], "math": [0, 1], "code": [1, 1]}


def json_file(folder, content):
    path = folder / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def resolved(**settings):
    return resolve_files(MixingConfig(**settings), SOURCES)


def test_values_are_put_into_the_order_of_the_sources(tmp_path):
    assert resolved(reference=json_file(tmp_path, LOSSES)) == {"reference_D": [2.0, 0.0, 1.5]}
    assert resolved(embeddings=json_file(tmp_path, VECTORS)) == {"embeddings_DV": [[1, 0], [0, 1], [1, 1]]}
    np.savez(tmp_path / "file.npz", **{name: np.array(vector) for name, vector in VECTORS.items()})
    assert resolved(embeddings=str(tmp_path / "file.npz")) == {"embeddings_DV": [[1, 0], [0, 1], [1, 1]]}
    assert resolved(sizes={"code": 7, "chat": 0.5, "math": 1e300}) == {"sizes_D": [0.5, 1e300, 7.0]}
    points = ([0, {"code": 2, "chat": 1, "math": 1}], [9, {"code": 1, "chat": 0, "math": 0}])
    assert resolved(schedule=points) == {"points": [[0, [0.25, 0.25, 0.5]], [9, [0.0, 0.0, 1.0]]]}


def test_a_runs_evaluation_is_a_reference(tmp_path):
    measured = {name: {"loss": loss, "tokens": 5} for name, loss in LOSSES.items()}
    path = json_file(tmp_path, {"iteration": 7, "sources": measured, "mean_loss": 1.0})
    assert resolved(reference=path) == {"reference_D": [2.0, 0.0, 1.5]}


def test_a_source_given_twice_is_refused(tmp_path):
    path = json_file(tmp_path, '{"chat": 2, "math": 0, "code": 1, "chat": 3}')
    with pytest.raises(InputError, match="chat"):
        resolved(reference=path)


def test_the_last_weights_of_another_run_are_taken_by_name(tmp_path):
    run = fake_run(7)
    weights = dict(zip(run.prints, run.mixing[6]["new_weights"], strict=True))
    folder = run.write(tmp_path / "run")
    sources = ["code", "chat", "math"]
    found = resolve_files(MixingConfig(weights_from=str(folder)), sources)["weights_D"]
    assert found == pytest.approx([weights[name] for name in sources])


def test_the_mean_of_another_runs_weights_is_over_its_rows(tmp_path):
    run = fake_run(8)
    stages = [line for line in run.ledger if line["kind"] == "stage"]
    rows = np.diff([*(line["start_sample"] for line in stages), 8 * BATCH])
    mean = dict(
        zip(run.prints, rows @ np.array([line["weights"] for line in stages]) / rows.sum(), strict=True)
    )
    folder = run.write(tmp_path / "run")
    sources = ["code", "chat", "math"]
    found = resolve_files(MixingConfig(weights_from=str(folder), weights_mean=True), sources)["weights_D"]
    assert found == pytest.approx([mean[name] for name in sources])


def test_sources_that_changed_have_no_mean(tmp_path):
    run = fake_run(4)
    run.change_sources({"chat": ["a"], "law": ["b"], "code": ["c"]}, (40, 17, 9))
    folder = run.train(4).write(tmp_path / "run")
    with pytest.raises(InputError, match="changed"):
        resolve_files(MixingConfig(weights_from=str(folder), weights_mean=True), ["chat", "law", "code"])


def test_weights_of_a_file_are_taken_by_name(tmp_path):
    path = json_file(tmp_path, {"chat": 2, "math": 1, "code": 1})
    assert resolved(weights_from=path) == {"weights_D": [0.5, 0.25, 0.25]}
    with pytest.raises(InputError, match="weights_mean"):
        resolved(weights_from=path, weights_mean=True)


@pytest.mark.parametrize(
    "content, part",
    [
        ({"chat": 1, "math": -1, "code": 1}, "-1.0, 1.0"),
        ({"chat": 1}, "missing math, code"),
        ([1, 2, 3], "list"),
    ],
)
def test_weights_of_a_file_that_are_none_are_refused(tmp_path, content, part):
    with pytest.raises(InputError, match=part):
        resolved(weights_from=json_file(tmp_path, content))


@pytest.mark.parametrize(
    "setting, content, part",
    [
        ("reference", {"chat": 1, "math": 1}, "missing code, unknown none"),
        ("target", {**LOSSES, "law": 1}, "missing none, unknown law"),
        ("reference", {**LOSSES, "math": -100}, "the loss of source math is -100"),
        ("reference", '{"chat": 1, "math": NaN, "code": 1}', "NaN is no JSON value"),
        ("reference", {**LOSSES, "math": "2"}, "the loss of source math is '2'"),
        ("reference", "[1, 2]", "holds list"),
        ("reference", "{", "not JSON"),
        ("embeddings", {**VECTORS, "math": [1]}, "different lengths"),
        ("embeddings", {**VECTORS, "math": ["x"]}, "source math is no list of numbers"),
        ("embeddings", '{"chat": [1], "math": [NaN], "code": [1]}', "NaN is no JSON value"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, setting, content, part):
    with pytest.raises(InputError) as caught:
        resolved(**{setting: json_file(tmp_path, content)})
    assert part in str(caught.value) and "file.json" in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), 10**400, True, "7", None, [1]])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match=r"mixing\.sizes: the size of source math is "):
        resolved(sizes={"chat": 1, "math": size, "code": 1})


@pytest.mark.parametrize("sizes", [{"chat": 1, "math": 1}, {**LOSSES, "law": 1}, {}])
def test_sizes_of_other_sources_are_refused(sizes):
    with pytest.raises(InputError, match=r"mixing\.sizes does not match the sources: missing .*unknown "):
        resolved(sizes=sizes)


def test_files_that_are_not_there_are_named(tmp_path):
    for setting in ("reference", "target", "embeddings"):
        with pytest.raises(InputError, match=r"gone\.json: there is no such file"):
            resolved(**{setting: str(tmp_path / "gone.json")})
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"bad\.npz cannot be read"):
        resolved(embeddings=str(tmp_path / "bad.npz"))


def test_a_run_without_updates_has_no_last_weights(tmp_path):
    with pytest.raises(InputError, match=r"holds no mixing\.jsonl"):
        resolved(weights_from=str(tmp_path))
    folder = fake_run(2).write(tmp_path / "run")
    (folder / "mixing.jsonl").touch()
    with pytest.raises(InputError, match="holds no weight update"):
        resolved(weights_from=str(folder))


@pytest.mark.parametrize(
    "points",
    [([0],), (["0", {}],), ([0, [1, 2, 3]],), ([0, {"chat": 1}],), ([0, {**LOSSES, "chat": -1}],)],
)
def test_a_plan_that_is_none_is_refused(points):
    with pytest.raises(InputError, match=r"mixing\.schedule"):
        resolved(schedule=points)
