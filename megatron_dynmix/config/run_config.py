"""The RunConfig tree: frozen, and checked at construction for what one value alone can get wrong.

Fields of Megatron-Core's own dataclasses are written flat in YAML beside ours; here they are kept in each
section's `megatron` mapping, as options of a strategy are in `mixing.options`. What several settings must
agree on is checked in `check`.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, fields, replace
from datetime import date
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from megatron_dynmix.config.strategies import Chosen, chosen_begin, chosen_shadow, complete_options, is_own
from megatron_dynmix.errors import InputError

Overlong = Literal["drop", "truncate", "split", "error"]
TrainOn = Literal["all", "last", "completion", "rounds", "everything"]
FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
Speaker = Literal["system", "user", "assistant", "tool", "function_call"]
"""Who says a turn; `function_call` is the assistant, with the JSON of its calls as the text."""
RowFormat = Literal["auto", FormatName]
RouterNoise = Literal["idle", "training"]
HUB = "hf://"
"""What stands before the name of a tokenizer on the Hugging Face hub."""
JINJA_SUFFIXES = (".jinja", ".j2")
RESERVED = ("messages", "tools", "add_generation_prompt")
"""What a chat template is given of the conversation itself."""
FLAT = ("megatron", "options")
"""Mappings of a section that are written flat in YAML."""


class Need(NamedTuple):
    """What a value must be: in words, and as a test of one that is not None."""

    words: str
    holds: Callable[[Any], bool]


T = TypeVar("T")
S = TypeVar("S", bound="Section")
Positive = Annotated[T, Need("a positive number", lambda value: value > 0 and math.isfinite(value))]
NotNegative = Annotated[T, Need("0 or more", lambda value: value >= 0)]


def require(condition: bool, name: str, value: object, need: str) -> None:
    """Raise InputError unless `condition` holds of the setting `name`."""
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {need}")


@functools.cache
def _needs(section: type) -> dict[str, Need]:
    """Return setting -> what its type says that it must be."""
    needs = {}
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, Need):
                needs[name] = kind
            elif typing.get_origin(kind) is Literal:
                needs[name] = Need(f"one of {', '.join(get_args(kind))}", get_args(kind).__contains__)
    return needs


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the configuration: checks each value by the type of its field."""

    def __post_init__(self) -> None:
        kind: type = type(self)
        section = kind.__name__.removesuffix("Config").lower()
        for name, need in _needs(kind).items():
            value = getattr(self, name)
            require(value is None or need.holds(value), f"{section}.{name}", value, need.words)

    def flat(self) -> dict[str, Any]:
        """Return the section as in YAML: what `FLAT` holds beside the other settings."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        rest = {name: value for flat in FLAT for name, value in settings.pop(flat, {}).items()}
        return {**settings, **rest}

    @classmethod
    def from_flat(cls: type[S], settings: Mapping[str, Any]) -> S:
        """Read `flat` back, from JSON too, which has lists for tuples."""
        own = {item.name for item in fields(cls)}
        given = {name: value for name, value in settings.items() if name in own}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        for flat in own.intersection(FLAT):
            given[flat] = {name: value for name, value in settings.items() if name not in own}
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which model; any field of Megatron-Core's `TransformerConfig` may stand beside these."""

    preset: str | None = "tiny"
    """Where the shape comes from: the name of published sizes, such as `mixtral-8x7b`, or a folder with a
    config.json of Hugging Face's; null for nothing but the settings beside it."""
    load_hf: str | None = None
    """Hugging Face folder whose weights a fresh run starts from, and whose shape the model has."""
    vocab_size: Positive[int | None] = None
    """Rows of the embedding, before padding; the preset's if not given."""
    make_vocab_size_divisible_by: Positive[int] = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Positive[int | None] = None
    """Longest sequence the model allows; the preset's if not given."""
    rotary_base: Positive[float | None] = None
    """Base of the rotary embedding; the preset's if not given."""
    rotary_percent: Annotated[float, Need("above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """Share of each head that is rotated: its first numbers, in pairs."""
    rotary_seq_len_interpolation_factor: Positive[float | None] = None
    """Positions are divided by this before they are rotated: linear scaling to longer sequences."""
    yarn_correction_range_round_to_int: bool = True
    """Whether YaRN's ramp (`rope_type: yarn`) lies between whole dimensions: `truncate` in config.json."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own."""
    qk_layernorm_full_width: bool = False
    """Normalise queries and keys over all heads together, as OLMoE does, not head by head."""
    latent_layernorm_epsilon: Positive[float | None] = None
    """Epsilon of the norms of latent attention's latents, if it is not `layernorm_epsilon`."""
    embedding_multiplier: Positive[float] = 1.0
    """What the embedding is multiplied by, as Granite has it."""
    residual_multiplier: Positive[float] = 1.0
    """What attention and MLP of each layer are multiplied by before they are added to what came in."""
    logits_scaling: Positive[float] = 1.0
    """What logits are divided by."""
    activation: Literal["silu", "gelu-tanh", "quick-gelu"] = "silu"
    """Between the linear layers of MLPs and experts; gelu-tanh is `gelu_new` of transformers, quick-gelu is
    x sigmoid(1.702 x)."""
    attention_experts: Positive[int | None] = None
    """Experts that project queries and outputs, as ModuleFormer (MoLM) has them: each token attends once with
    each of num_attention_heads of them, by breaking sticks; its keys and values are the layer's input."""
    router_network: Literal["linear", "mlp", "gelu"] = "linear"
    """How routers make their logits: by one matrix, by two with a tanh between (LLaMA-MoE), or by two with a
    bias and a GELU between (ModuleFormer)."""
    router_width: Positive[int | None] = None
    """Width between the two matrices of `router_network: gelu`."""
    router_noise: RouterNoise | None = None
    """Noise of a learnt size on the logits of `router_network: mlp`, while `training`; if `idle`, its weights
    are kept and not used; if not given, there are none."""
    freeze_router: bool = False
    """Keep the routers as they are: their weights get no gradient, and an expert bias does not move."""
    freeze_expert_gate: bool = False
    """Keep the gate projections of all experts as they are (half of linear_fc1, before the activation)."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig`."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Layout; any field of `ModelParallelConfig` or `DistributedDataParallelConfig` may stand beside."""

    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    distributed_timeout_minutes: Positive[float] = 10.0
    """How long a collective waits for the other ranks."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelParallelConfig` and `DistributedDataParallelConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.megatron.items():
            if name.endswith(("_parallel_size", "_optimizer_instances")) and value is not None:
                require(value >= 1, f"parallel.{name}", value, "1 or more")

    @property
    def virtual_stages(self) -> int:
        """Chunks of the model that each pipeline stage has, one after another; 0 if not interleaved."""
        return int(self.megatron.get("virtual_pipeline_model_parallel_size") or 0)

    @property
    def overlap_p2p_comm(self) -> bool:
        """Whether pipeline stages send while they compute: as Megatron-LM has it, if interleaved."""
        given = self.megatron
        return bool(given.get("overlap_p2p_comm", self.virtual_stages and not given.get("batch_p2p_comm")))

    def size(self, name: str) -> int:
        """Return a group size such as `tensor_model_parallel_size`; 1 if not given."""
        return int(self.megatron.get(name) or 1)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One named dataset."""

    path: str
    """A file, a pattern, a folder, or the prefix of a prepared source."""
    format: RowFormat = "auto"
    """Shape of the rows; found out for each file by its first rows if not given."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Names that our keys have in the rows, such as `{prompt: question, completion: answer}`."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Who is who, beyond the roles that are known, such as `{bot: assistant, customer: user}`."""
    weight: float | None = None
    """Initial share; uniform if no source has one."""
    probe: str | None = None
    """Held-out rows of the same kind, for `mixing.signal: probe` and for evaluation."""
    max_epochs: Positive[float | None] = None
    """Epochs after which the source is drawn no more; its share goes to the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named = all(isinstance(name, str) for pair in self.fields.items() for name in pair)
        require(named, "source.fields", self.fields, "names, as {prompt: question}")
        known = get_args(Speaker)
        named = all(isinstance(name, str) and role in known for name, role in self.roles.items())
        need = f"names in the rows, each with one of {', '.join(known)}, as {{bot: assistant}}"
        require(named, "source.roles", self.roles, need)
        good = self.weight is None or (math.isfinite(self.weight) and self.weight >= 0)
        require(good, "source.weight", self.weight, "a finite number, 0 or more")


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_json(value: object) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is trained on."""

    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer, a SentencePiece or tiktoken file, or `hf://ORGANISATION/NAME`."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the tokenizer may run."""
    template: str = "tokenizer"
    """How a conversation becomes text: the tokenizer's own chat template, `vicuna`, `chatml`, `plain`, or the
    path of a Jinja file."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given beside the conversation, such as `{enable_thinking: false}`; what a row
    says itself (`chat_template_kwargs`) comes first."""
    template_date: str | None = None
    """The day that a chat template is told when it asks (`strftime_now`), as `2026-01-31`; without one such a
    template is refused, as the same rows must give the same tokens on any day."""
    train_on: TrainOn = "all"
    """Which tokens are trained on: all answers, the last one, the only one of rows with one
    (`completion`), all answers with each round as it was generated, an example of its own (`rounds`), or
    everything."""
    seq_length: Positive[int] = 2048
    """Positions of a row."""
    packing: bool = True
    """Whether a row holds as many whole examples as fit; if not, each row holds one."""
    segment_multiple: Positive[int] = 1
    """Each example of a row is padded to a multiple of so many positions: 2 x context-parallel size, or a
    multiple of that, lets Transformer Engine's own attention run under context parallelism."""
    overlong: Overlong = "drop"
    """What to do with an example longer than a row: drop and count it, truncate it, split it at turn borders
    (what is too long even so is dropped), or stop."""
    probe: Positive[int | None] = None
    """Examples of each source without a `probe` file that are kept from training to be its probe."""
    strict: bool = False
    """Whether one row that cannot be used is an error; if not, such rows are counted and left out."""
    num_workers: NotNegative[int] = 1
    """Processes that read rows, per rank."""
    prepared_dir: str = "prepared"
    """Where JSONL sources are prepared to, and packings cached."""
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Name -> source, in the order of their dataset_id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.template in ("tokenizer", "vicuna", "chatml", "plain")
        good = known or self.template.endswith(JINJA_SUFFIXES)
        require(good, "data.template", self.template, "one of tokenizer, vicuna, chatml, plain")
        kwargs = dict(self.template_kwargs)
        need = f"values that JSON has (put quotes around dates), under other names than {', '.join(RESERVED)}"
        good = _is_json(kwargs) and not set(RESERVED) & set(kwargs)
        require(good, "data.template_kwargs", kwargs, need)
        is_day = self.template_date is None or _is_day(self.template_date)
        require(is_day, "data.template_date", self.template_date, "a day, as 2026-01-31")

    @property
    def probed(self) -> tuple[str, ...]:
        """Names of the sources that have held-out rows, in order."""
        return tuple(name for name, source in self.sources.items() if source.probe is not None or self.probe)


@dataclass(frozen=True, kw_only=True)
class MixingConfig(Section):
    """How the weights change."""

    strategy: str = "uniqueness"
    """A built-in one, or `module:name` of your own."""
    interval: Positive[int] = 100
    """Iterations between two weight updates (the paper's m)."""
    unit: Literal["tokens", "examples"] = "tokens"
    """What a weight is a share of: the tokens drawn (rows, all equally long), or the examples (the paper)."""
    signal: Literal["probe", "train"] = "train"
    """Where gate loads are measured: on held-out rows, or while training."""
    probe_tokens: Positive[int] = 16384
    """Positions of each source's held-out rows that a probe reads."""
    probe_rows: Literal["fixed", "rotating"] = "fixed"
    """Whether every probe reads the same rows, or each goes on where the last one stopped."""
    load_tokens: Literal["all", "trained"] = "all"
    """Tokens that gate loads are made of: all but padding, or those whose label is trained on."""
    load_mass: Literal["count", "probability"] = "count"
    """What a token adds to the load of an expert it goes to: 1, or the weight its output gets."""
    load_routers: Literal["mlp", "attention"] = "mlp"
    """Routers that gate loads are made of: those of MLP experts, or of `attention_experts` (MoLM)."""
    min_tokens: NotNegative[int] = 1
    """Tokens of a source in an interval, for `signal: train`; with fewer its last known values are used."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of a built-in strategy, flat in YAML; those not given are filled in."""
    strategy_options: dict[str, Any] = field(default_factory=dict)
    """Options of a strategy of your own."""
    reference: str | None = None
    """JSON file {source: loss in nats} of a reference model."""
    target: str | None = None
    """JSON file {source: loss in nats} that is aimed at."""
    weights_from: str | None = None
    """Run directory whose last weights are taken, or a JSON file {source: weight}, in the unit of the run."""
    weights_mean: bool = False
    """Whether the mean of that run's weights over all its rows is taken instead."""
    embeddings: str | None = None
    """JSON or .npz file {source: vector}."""
    schedule: tuple[Any, ...] | None = None
    """[[iteration, {source: weight}], ...]."""
    match: str | None = None
    """Name of the source that is the target of `match-load`."""
    sizes: dict[str, float] | None = None
    """{source: size}, for strategies by size: of originals that only a part of was released, in any unit."""
    begin_with: str | dict[str, Any] | None = None
    """Strategy that chooses the first weights, where `strategy` does not: a name, or
    {strategy: NAME, option: value}."""
    similarity_correction: bool = False
    """Whether sources with like gate loads share what one of them would get, whatever the strategy."""
    weight_floor: float = 0.0
    """Least weight of a source that is not paused."""
    max_kl_step: float | None = None
    """Longest step of an update, in nats of KL from the old weights to the new."""
    min_entropy: float | None = None
    """Least entropy of the weights, as a share of the uniform mix's."""
    prior: str | dict[str, float] | None = None
    """Weights to be pulled towards, and that `uniqueness` begins with: {source: weight}, `size` or
    `uniform`."""
    prior_pull: float = 0.0
    """How far each update is pulled towards the prior, from 0 to 1."""
    override_file: str | None = None
    """What an operator writes to change or pause sources; `override.json` in the run directory."""
    shadow: tuple[str | dict[str, Any], ...] = ()
    """Strategies that are asked beside it and change nothing: a name, or {strategy: NAME, option: value}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = complete_options(self.strategy, self.options, "mixing")
        if self.strategy_options and not is_own(self.strategy):
            raise InputError(
                f"mixing.strategy_options are for a strategy of your own (MODULE:NAME), not for "
                f"{self.strategy}; write its options into the mixing section"
            )
        if self.weights_mean and self.weights_from is None:
            raise InputError("mixing.weights_mean is of the run that weights_from names; give that, too")
        if self.similarity_correction and self.strategy == "uniqueness":
            raise InputError("mixing.similarity_correction is what uniqueness does itself; leave it out")
        object.__setattr__(self, "options", options)  # frozen: this is the construction
        if self.begin_with is not None and not is_own(self.strategy):
            chosen_begin(self.begin_with, self._without_begin)
        labels = [shadow.label for shadow in self.shadows]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"mixing.shadow holds {label} twice; give each another option, or only one")

    @property
    def chosen(self) -> Chosen:
        """The strategy in charge, with its options."""
        chosen = self._without_begin
        if self.begin_with is None:
            return chosen
        return replace(chosen, begin=chosen_begin(self.begin_with, chosen))

    @property
    def _without_begin(self) -> Chosen:
        own = is_own(self.strategy)
        options = self.strategy_options if own else self.options
        return Chosen(
            label=self.strategy,
            strategy=self.strategy,
            options=options,
            own=own,
            corrected=self.similarity_correction,
        )

    @property
    def measures_same_rows(self) -> bool:
        """Whether each update is measured on the rows of the one before."""
        return self.signal == "probe" and self.probe_rows == "fixed"

    @property
    def shadows(self) -> list[Chosen]:
        """The strategies beside it."""
        return [chosen_shadow(entry) for entry in self.shadow]

    @property
    def asked(self) -> list[Chosen]:
        """All strategies that are asked at any time."""
        chosen = self.chosen
        return [chosen, *([] if chosen.begin is None else [chosen.begin]), *self.shadows]

    @property
    def measures(self) -> bool:
        """Whether a strategy, or a shadow, asks for loads or losses."""
        return any(any(chosen.needs) for chosen in self.asked)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Length, batch and precision."""

    train_iters: Positive[int | None] = None
    """Iterations of the run."""
    micro_batch_size: Positive[int] = 1
    """Rows that a rank runs at a time."""
    global_batch_size: Positive[int | None] = None
    """Rows of an iteration, over all ranks."""
    rampup_batch_size: tuple[int, ...] | None = None
    """Start, increment and samples: the batch grows to `global_batch_size` over so many samples."""
    step_batch_size_schedule: str | None = None
    """`THRESHOLD:BATCH_SIZE ...`: the batch size from so many tokens on, as `0:64 1B:128`; K, M, B and T are
    thousands and so on. The last one is `global_batch_size`."""
    seed: NotNegative[int] = 1234
    """Seed of the initial weights, dropout, and the order of the samples."""
    bf16: bool = False
    """Parameters and activations in bfloat16, master weights and gradients in float32."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop at the last good state, or skip the batch."""
    manual_gc_interval: Positive[int | None] = None
    """Iterations between two collections of garbage, by all ranks at once, with Python's own off in between;
    Python collects when it likes if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ramp = self.rampup_batch_size
        good = ramp is None or (len(ramp) == 3 and min(ramp) > 0)
        require(good, "training.rampup_batch_size", ramp, "START INCREMENT SAMPLES, each 1 or more")
        if self.step_batch_size_schedule is not None:
            from megatron_dynmix.config.batch_schedule import token_steps  # of no use to `update`

            last = token_steps(self.step_batch_size_schedule)[-1][1]
            need = f"{last}, with which step_batch_size_schedule ends, or left out"
            given = self.global_batch_size
            require(given in (None, last), "training.global_batch_size", given, need)
            object.__setattr__(self, "global_batch_size", last)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Learning rate and its schedule; any field of Megatron-Core's `OptimizerConfig` may stand beside."""

    lr: Positive[float] = 2.0e-5
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["linear", "cosine", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay; WSD (warm-up, stable, decay) stays at `lr` until the last `lr_wsd_decay_iters`."""
    lr_decay_iters: Positive[int | None] = None
    """Iterations until `min_lr`; `train_iters` if not given."""
    lr_warmup_iters: NotNegative[int] = 0
    """Iterations over which the learning rate rises from 0."""
    lr_wsd_decay_iters: Positive[int | None] = None
    """Iterations over which WSD falls to `min_lr`."""
    lr_wsd_decay_samples: Positive[int | None] = None
    """The same in samples."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = None
    """Shape of that fall; exponential if not given."""
    weight_decay: NotNegative[float] = 0.0
    """Decoupled, as AdamW's; norms and biases have none."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's `OptimizerConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"from 0 to lr ({self.lr})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is kept of a run, and what it starts from."""

    save_interval: Positive[int | None] = None
    """Iterations between two checkpoints; one is always written at the end."""
    pretrained_checkpoint: str | None = None
    """Checkpoint folder (the parent of `iter_*`) whose weights a fresh run starts from."""
    async_save: bool = False
    """Write checkpoints beside the training that goes on."""
    keep_last: Positive[int | None] = None
    """Checkpoints that are kept, the newest ones; all if not given."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run; the last one always ends it."""
    save_hf: Literal["end", "every"] | None = None
    """Write the model as a Hugging Face folder too: at the end of the run, or with every checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """How much is said."""

    log_interval: Positive[int] = 10
    """Iterations between two log lines."""
    log_sources: Positive[int] = 20
    """Sources that a line or a table of the log shows: of more, those that move or count most."""
    wandb_project: str | None = None
    """Project on Weights & Biases that gets the numbers too; needs the extra `wandb`."""
    wandb_exp_name: str | None = None
    """Name of the run there; that of its directory if not given."""

    def most_of(self, sources: Sized) -> int | None:
        """Return how many of the sources a table shows; None for all of them."""
        return self.log_sources if len(sources) > self.log_sources else None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


SECTIONS: dict[str, type[Section]] = typing.get_type_hints(RunConfig)
"""Name of a section -> its settings."""
