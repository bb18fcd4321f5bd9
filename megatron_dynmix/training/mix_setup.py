"""From settings to what decides weights.

Used by a run before it starts, by `update`, and by `verify` from the settings on record: what settings give
by file or by source name becomes plain lists in the order of the sources, which the ledger can hold. Axes:
D sources, V dimensions of an embedding.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.config.strategies import RESOLVED, Chosen, check_given, resolved_options
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import read_json
from megatron_dynmix.mixing.controller import ControllerState, MixingController
from megatron_dynmix.mixing.guardrails import Guardrails
from megatron_dynmix.mixing.strategies import build_strategy
from megatron_dynmix.mixing.strategies.uniqueness import Corrected
from megatron_dynmix.mixing.strategy import BeginningWith, InExamples, SourceError, Strategy
from megatron_dynmix.mixing.weights import example_shares, is_number, normalise_weights, row_shares

Resolved = Mapping[str, Any]
"""Options that came from files; the sources' `max_epochs` (None: no cap) and, where weights are shares of
examples, their `examples_per_row`, in the order of the sources."""
OF_ROWS = "weights_of_rows"
"""Stands in `Resolved` where the weights are a run's, which are shares of rows whatever its unit."""


def resolve_files(mixing: MixingConfig, sources: Sequence[str]) -> dict[str, Any]:
    """Return the value of each option of `RESOLVED` whose setting is given; `InputError` if it is no such."""
    readers: dict[str, Callable[[Any, Sequence[str]], Any]] = {
        "reference": read_losses,
        "target": read_losses,
        "weights_from": partial(other_weights, mean=mixing.weights_mean),
        "embeddings": read_embeddings,
        "schedule": schedule_points,
        "sizes": source_sizes,
        "match": source_number,
    }
    resolved = {
        RESOLVED[setting]: read(given, sources)
        for setting, read in readers.items()
        if (given := getattr(mixing, setting)) is not None
    }
    if mixing.weights_from is not None and Path(mixing.weights_from).is_dir():
        resolved[OF_ROWS] = True
    return resolved


def read_losses(given: str | Path, sources: Sequence[str]) -> list[float]:
    """Read losses of all sources, in nats, from a JSON file {source: loss} or a run's ``evaluation.json``."""
    path = Path(given)
    content = read_json(path)
    if isinstance(content, dict) and "iteration" in content and isinstance(content.get("sources"), dict):
        content = {name: measured.get("loss") for name, measured in content["sources"].items()}
    content = _by_source(path, content, sources)
    for name, loss in content.items():
        if not is_number(loss) or loss < 0:
            raise InputError(
                f"{path}: the loss of source {name} is {loss!r:.60}; it must be a finite number of nats, 0 "
                "or more"
            )
    return [float(content[name]) for name in sources]


def other_weights(given: str | Path, sources: Sequence[str], *, mean: bool = False) -> list[float]:
    """Read weights by the names of the sources: of a JSON file {source: weight}, or of another run.

    Of a run those that it ended with, or the `mean` over all rows that it drew (as DoReMi takes them: Xie et
    al., 2023).
    """
    path = Path(given)
    if path.is_dir():
        weights = _weights_of_run(path, mean=mean)
    elif mean:
        raise InputError(f"mixing.weights_mean is over the rows of a run, but {path} is none; leave it out")
    else:
        weights = read_json(path)
    try:
        return normalise_weights(_by_source(path, weights, sources), sources).tolist()
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its weights cannot be used: {error}") from None


def _weights_of_run(run_dir: Path, *, mean: bool) -> dict[str, float]:
    from megatron_dynmix.records.jsonl import read_lines, read_records  # `update` needs no record of a run
    from megatron_dynmix.records.schema import MixingUpdate, TrainingRecord

    path = run_dir / "mixing.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no mixing.jsonl; give the --run-dir of a run")
    updates = [MixingUpdate.salvaged(record) for record in read_records(path)]
    if not updates:
        raise InputError(
            f"{path} holds no weight update, so the run ended with the weights it began with; give those as "
            "weights of data.sources, with strategy fixed"
        )
    last = updates[-1]
    weights_D = np.array(last.new_weights)
    if mean:
        if any(update.sources != last.sources for update in updates):
            raise InputError(f"{path}: the sources of the run changed, so there is no mean of its weights")
        metrics = run_dir / "metrics.jsonl"
        ends = (
            [record.consumed_samples for record in read_lines(metrics, TrainingRecord)]
            if metrics.is_file()
            else []
        )
        borders = [0, *(update.consumed_samples for update in updates)]
        rows_U = np.diff([*borders, max([borders[-1], *ends])])
        stages_UD = np.array([*(update.old_weights for update in updates), last.new_weights])
        weights_D = rows_U @ stages_UD / rows_U.sum()
    return dict(zip(last.sources, weights_D.tolist(), strict=True))


def read_embeddings(given: str | Path, sources: Sequence[str]) -> list[list[float]]:
    """Read a vector of each source from a JSON file {source: [number, ...]} or an .npz of an array each."""
    path = Path(given)
    content = _by_source(path, _read_npz(path) if path.suffix == ".npz" else read_json(path), sources)
    vectors = []
    for name in sources:
        vector = content[name]
        flat = isinstance(vector, list) or np.ndim(vector) == 1
        if not flat or not len(vector) or not all(map(is_number, vector)):
            raise InputError(
                f"{path}: the embedding of source {name} is no list of numbers; give one vector "
                "of finite numbers per source"
            )
        vectors.append(list(map(float, vector)))
    if len({len(vector) for vector in vectors}) > 1:
        lengths = {name: len(vector) for name, vector in zip(sources, vectors, strict=True)}
        raise InputError(f"{path}: the embeddings have different lengths: {lengths}; use one encoder for all")
    return vectors


def schedule_points(points: Sequence[Any], sources: Sequence[str]) -> list[list[Any]]:
    """Return `[[iteration, {source: weight}], ...]` with the weights in the order of the sources."""
    resolved = []
    for point in points:
        match point:
            case (int(iteration), Mapping() as weights):
                pass
            case _:
                raise InputError(
                    f"mixing.schedule holds {point!r}; give [[iteration, {{source: weight, ...}}], ...]"
                )
        try:
            resolved.append([iteration, normalise_weights(weights, sources).tolist()])
        except (TypeError, ValueError) as error:
            raise InputError(f"mixing.schedule at iteration {iteration}: {error}") from None
    return resolved


def source_number(name: str, sources: Sequence[str]) -> int:
    """Return the dataset_id of a source."""
    if name not in sources:
        raise InputError(f"mixing.match is {name}, which is none of {', '.join(sources)}")
    return list(sources).index(name)


def source_sizes(sizes: Mapping[str, Any], sources: Sequence[str]) -> list[float]:
    """Return the sizes, numbers above 0, in the order of the sources."""
    content = _by_source("mixing.sizes", sizes, sources)
    for name, size in content.items():
        if not is_number(size) or size <= 0:
            raise InputError(
                f"mixing.sizes: the size of source {name} is {size!r:.60}; give a finite number above 0 "
                "(what is not to be drawn is left out of data.sources)"
            )
    return [float(content[name]) for name in sources]


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except Exception as error:  # of zipfile, zlib or NumPy, whatever is broken
        raise InputError(f"{path} cannot be read as an .npz file: {error}") from None


def _by_source(path: Path | str, content: Any, sources: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}; it must hold an object {{source: value}}")
    missing = [name for name in sources if name not in content]
    unknown = [name for name in content if name not in sources]
    if missing or unknown:
        raise InputError(
            f"{path} does not match the sources: missing {', '.join(missing) or 'none'}, unknown "
            f"{', '.join(unknown) or 'none'}; give one value for each of {', '.join(sources)}"
        )
    return dict(content)


def reason(error: Exception, sources: Sequence[str] = ()) -> str:
    """Say what is wrong; the kind and place of an exception too, where it is none that we raise ourselves."""
    if isinstance(error, SourceError) and sources:
        return error.named(sources)
    if isinstance(error, ValueError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({frame.filename}:{frame.lineno} in {frame.name})" for frame in place)
    return f"{type(error).__name__}: {error}{where}"


@contextmanager
def refusing(mixing: MixingConfig, where: str = "mixing", sources: Sequence[str] = ()) -> Iterator[None]:
    """Say what is wrong with settings as `InputError`, also where a user's own code fails in its own way."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        own = any(chosen.own for chosen in mixing.asked)
        if not own and not isinstance(error, ValueError | TypeError):
            raise
        raise InputError(f"{where}: {reason(error, sources)}") from None


def strategy_of(chosen: Chosen, resolved: Resolved) -> Strategy:
    """Build a strategy with its options, those from files included; ValueError if it cannot take one."""
    strategy = _built(chosen, resolved)
    if chosen.begin is not None:
        strategy = BeginningWith(strategy, _built(chosen.begin, resolved))
    if chosen.corrected:
        strategy = Corrected(strategy)
    per_row_D = examples_per_row(resolved)
    return strategy if per_row_D is None else InExamples(strategy, per_row_D)


def _built(chosen: Chosen, resolved: Resolved) -> Strategy:
    given = [name for name in resolved_options(chosen.strategy) if RESOLVED[name] in resolved]
    check_given(chosen, given)
    from_files = {RESOLVED[name]: resolved[RESOLVED[name]] for name in given}
    per_row_D = examples_per_row(resolved)
    of_rows = [RESOLVED["prior"], *([RESOLVED["weights_from"]] if OF_ROWS in resolved else [])]
    for option in of_rows:
        if per_row_D is not None and option in from_files:
            from_files[option] = example_shares(np.array(from_files[option]), per_row_D).tolist()
    return build_strategy(chosen.strategy, {**chosen.options, **from_files})


def examples_per_row(resolved: Resolved) -> NDArray[np.float64] | None:
    """Return those of each source where weights are shares of examples, None where they are of rows."""
    return np.array(resolved["examples_per_row"]) if "examples_per_row" in resolved else None


def in_rows(weights_D: NDArray[np.float64], resolved: Resolved) -> NDArray[np.float64]:
    """Return weights that a user has written, in the unit of the run, as shares of the rows."""
    per_row_D = examples_per_row(resolved)
    return weights_D if per_row_D is None else row_shares(weights_D, per_row_D)


def prior_of(
    mixing: MixingConfig, resolved: Resolved, sources: Sequence[str], size_D: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Return the prior as shares of the rows, if there is one; ValueError if it is of other sources."""
    if mixing.prior is None:
        return None
    if mixing.prior == "size":
        return normalise_weights(size_D)
    if mixing.prior == "uniform":
        return in_rows(normalise_weights(np.ones(len(sources))), resolved)
    if isinstance(mixing.prior, Mapping):
        return in_rows(normalise_weights(mixing.prior, sources), resolved)
    raise ValueError(f"prior is {mixing.prior!r}; give {{source: weight}}, size or uniform")


def guardrails_of(
    mixing: MixingConfig, resolved: Resolved, prior_D: NDArray[np.float64] | None
) -> Guardrails:
    """Build the limits on the weights; ValueError if one is out of range."""
    caps = resolved.get("max_epochs")
    return Guardrails(
        floor=mixing.weight_floor,
        max_kl_step=mixing.max_kl_step,
        min_entropy=mixing.min_entropy,
        prior_D=prior_D,
        prior_pull=mixing.prior_pull,
        max_epochs_D=caps and [np.inf if cap is None else cap for cap in caps],
    )


def controller_of(
    mixing: MixingConfig,
    resolved: Resolved,
    sources: Sequence[str],
    size_D: NDArray[np.int64],
    weights_D: NDArray[np.float64],
    *,
    without: Container[str] = (),
) -> MixingController:
    """Build strategy, guardrails and shadows of a run, but `without` some; ValueError if that cannot work.

    `size_D` are rows, `weights_D` shares of the rows, both in the order of `sources`.
    """
    prior_D = prior_of(mixing, resolved, sources, size_D)
    if prior_D is not None:
        resolved = {**resolved, RESOLVED["prior"]: prior_D.tolist()}
    return MixingController(
        sources,
        weights_D,
        strategy_of(mixing.chosen, resolved),
        guardrails=guardrails_of(mixing, resolved, prior_D),
        shadows={
            shadow.label: strategy_of(shadow, resolved)
            for shadow in mixing.shadows
            if shadow.label not in without
        },
    )


def for_strategy(state: ControllerState, before: str, after: str) -> ControllerState:
    """Return the state that a strategy begins with: another one's memory means nothing to it."""
    return state if before == after else state.with_new_strategy()


def row_caps(resolved: Resolved, size_D: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the most rows that may be drawn of each source, infinity where there is no cap."""
    caps = resolved.get("max_epochs", [None] * len(size_D))
    return np.floor(np.array([np.inf if cap is None else cap for cap in caps]) * size_D)
