"""Every key a recipe may hold, with its default and its meaning.

Imports neither torch, ray nor vllm: a recipe is checked before anything heavy starts.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from configs.errors import UserError
from configs.hardware import fast_dtype
from configs.method import KL as KL
from configs.method import Algorithm as Algorithm
from configs.method import Section as Section

DPO_BETA = 0.1

# `auto` is settled when the recipe is read: whatever runs or resumes later has the same type.
DType = Annotated[
    Literal["float32", "bfloat16"],
    BeforeValidator(lambda value: fast_dtype() if value == "auto" else value),
    WithJsonSchema({"enum": ["float32", "bfloat16", "auto"], "type": "string"}),
]


class Run(Section):
    name: str
    dir: str = "runs/{name}"
    """Where ledger, checkpoints, metrics spool and artifacts go; `{name}` is replaced."""
    seed: int = 0
    steps: int = Field(100, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept for resuming; the best version by the primary evaluation is kept besides, as a model."""
    prepare: str | None = None
    """`module:function` called with the recipe before every run; makes what is missing of its models and data."""
    prepare_options: dict[str, Any] = {}
    """What `prepare` is to make otherwise, by names of its own."""


class Resources(Section):
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


class Model(Section):
    path: str
    """Local directory or public model id, in HF format."""
    dtype: DType = "bfloat16"
    """auto: bfloat16 where the machine that reads the recipe has GPUs or CPU instructions for it, else float32."""
    max_length: int = Field(1024, ge=2)
    """Context: prompt and completion tokens together."""


class Data(Section):
    path: str
    """A .jsonl, .jsonl.gz, .csv or .parquet file, or a public dataset id."""
    name: str | None = None
    """Configuration of a public dataset (its `name` or `data_dir`); ignored for files."""
    source_split: str = "train"
    """Split of the public dataset; ignored for files."""
    format: Literal[
        "prompt",
        "messages",
        "pairs",
        "columns",
        "hh",
        "ultrafeedback",
        "ultrafeedback_binarized",
        "helpsteer2",
        "helpsteer2_preference",
        "gsm8k",
        "math",
    ] = "prompt"
    """prompt: a column of strings; messages: a column of chat turns; pairs: columns `prompt`, `chosen`, `rejected`;
    columns: those that `columns` names; the others: datasets as they are published (docs/data.md)."""
    column: str = "prompt"
    """Of format prompt or messages."""
    columns: dict[Literal["prompt", "chosen", "rejected", "margin", "completions", "scores"], str] = {}
    """Of format columns: which column is what, for example {prompt: question, chosen: best, rejected: worst}."""
    render: Literal["chat", "text"] = "chat"
    """chat: the tokenizer's chat template; text: the prompt string as it is. Reward models read the
    template if there is one."""
    system_prompt: str | None = None
    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts are left out, counted and reported; supervised trainings have a max_length of their own."""
    splits: dict[str, float] = {}
    """Shares by name, drawn by a hash of the prompt, so a prompt is in one split only."""
    split: str | None = None
    """Which of `splits` this consumer reads; none: all rows."""
    limit: int | None = Field(None, ge=1)
    """Rows taken, of those in `split`."""
    streaming: bool = False
    """Read a public dataset over the network as far as `limit` needs, without storing it."""


class SamplingParams(Section):
    n: int = Field(8, ge=1)
    """Completions per prompt."""
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop: list[str] = []
    extra: dict[str, Any] = {}
    """Any further field of vLLM's SamplingParams."""
    allow_truncated_distribution: bool = False
    """Train on top-p / top-k samples although a plain softmax is then not the behaviour policy."""


class Loop(Section):
    batch_prompts: int = Field(16, ge=1)
    """Groups per learner step; a step trains batch_prompts * sampling.n rollouts."""
    staleness: int = Field(1, ge=0)
    """Bound on (version being trained - oldest version in a rollout); 0 is synchronous."""
    discard_budget: float = Field(0.1, ge=0, le=1)
    """Share of admitted prompts that may be discarded before the run is stopped."""


class Optimizer(Section):
    learning_rate: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """linear and cosine end at 0 after the last update: of run.steps * algorithm.epochs * algorithm.minibatches, or of
    the offline training. An update for which an algorithm chooses no rollout is left out and still counts."""
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the rate rises."""


class Lora(Section):
    """Low-rank adapters that are trained instead of all weights (Hu et al. 2021).

    They have no dropout: old and new log-probs must be of one function.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    """The product of the adapters is scaled by alpha / rank."""
    target_modules: list[str] = []
    """Names of linear layers, for example [q_proj, v_proj]; none: all below the head."""


class Engine(Section):
    """A DeepSpeed engine."""

    ranks: int = Field(1, ge=1)
    zero: Literal[0, 1, 2, 3] = 2
    token_budget: int = Field(8192, ge=1)
    """Padded tokens per micro-batch."""
    share_prompts: bool = True
    """Send the prompt of several completions through the model once, where the architecture allows it."""
    gradient_checkpointing: bool = False
    # Left out of dumps while it is none: hashes of what was made before there was this key stay what they are.
    lora: Lora | None = Field(None, exclude_if=lambda lora: lora is None)
    """Train adapters and freeze the rest; what is published, evaluated and exported has them merged. Wants a higher
    learning rate than all weights do."""
    offload: bool = False
    """Keep optimizer state (and, under ZeRO 3, parameters) in CPU memory."""
    optimizer: Optimizer = Optimizer()
    resources: Resources = Resources()
    """Of each rank."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a rank; none: its CPUs."""


class Critic(Engine):
    path: str | None = None
    """Start weights: a reward model or the policy (default)."""


class Reference(Section):
    path: str | None = None
    """Default: model.path."""
    refresh_every: int | None = Field(None, ge=1)
    """Versions after which the policy of then becomes the reference, from which the KL is measured; none: never."""
    token_budget: int = Field(16_384, ge=1)
    share_prompts: bool = True
    """As the learner's."""
    resources: Resources = Resources()


class RewardComponent(Section):
    name: str
    model: str | None = None
    """HF sequence-classification model with one output (directory or id); with `reference`, a policy."""
    # Left out of dumps while they are none: hashes of what was made before there were these keys stay what they are.
    reference: str | None = Field(None, exclude_if=lambda path: path is None)
    """Start weights of a `model` that was trained by DPO: it scores beta·(log π - log π₀) of the completion."""
    beta: float | None = Field(None, gt=0, exclude_if=lambda beta: beta is None)
    """With `reference`: what it was trained with; default 0.1."""
    function: str | None = None
    """`module:function`, called with (prompt, completion, row) -> float."""
    weight: float = 1.0


class Reward(Section):
    components: list[RewardComponent] = []
    token_budget: int = Field(16_384, ge=1)
    share_prompts: bool = True
    """As the learner's."""
    dtype: DType = "float32"
    max_length: int = Field(1024, ge=2)
    deadline_s: float = Field(60, gt=0)
    """For one call of a reward function."""
    replicas: int = Field(1, ge=1)
    resources: Resources = Resources()


class GeneratorConfig(Section):
    replicas: int = Field(1, ge=1)
    transport: Literal["auto", "nccl", "object_store"] = "auto"
    update: Literal["in_flight", "drain"] = "in_flight"
    """in_flight: pause, swap weights, go on; drain: finish running requests first."""
    deadline_s: float = Field(300, gt=0)
    """For one group, queueing included."""
    startup_s: float = Field(300, gt=0)
    """For the replacement of a dead replica to come up."""
    retries: int = Field(2, ge=0)
    """Of a request that failed on a replica that is alive, elsewhere if possible, with back-off."""
    max_restarts: int = Field(2, ge=0)
    """How often a replica that died is replaced before the run ends; with nccl, never."""
    kv_cache_gb: float = Field(1, gt=0)
    """KV cache on CPU engines; GPU engines take gpu_memory_utilization in `engine`."""
    engine: dict[str, Any] = {}
    """Any field of vLLM's AsyncEngineArgs (tensor_parallel_size, gpu_memory_utilization, …)."""
    resources: Resources = Resources()


class EvalScorer(Section):
    name: str
    model: str | None = None
    reference: str | None = Field(None, exclude_if=lambda path: path is None)
    """This and beta as a reward component's."""
    beta: float | None = Field(None, gt=0, exclude_if=lambda beta: beta is None)
    function: str | None = None


class EvalTask(Section):
    name: str
    data: Data
    prompts: int = Field(128, ge=1)
    sampling: SamplingParams = SamplingParams(n=1)
    scorers: list[EvalScorer]
    at: Literal["every", "first_middle_last"] = "every"


class FinalEvaluation(Section):
    """When training ends, the versions that may be best are evaluated again by the primary task, on other prompts."""

    prompts: int | None = Field(None, ge=0)
    """Prompts that the best of them is chosen on, beyond the task's own; null: as many as those; 0: none of this."""
    untouched: int | None = Field(None, ge=2)
    """Further prompts, on which nothing is chosen: they say how good it is. null: as many as the task's."""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Versions between evaluations; version 0 and the last are always evaluated."""
    primary: str | None = None
    """`task/metric` that chooses the best checkpoint."""
    tasks: list[EvalTask] = []
    final: FinalEvaluation = FinalEvaluation()
    deadline_s: float = Field(1800, gt=0)
    kv_cache_gb: float = Field(1, gt=0)
    engine: dict[str, Any] = {}
    resources: Resources = Resources()


class AlarmConfig(Section):
    """Have reward and primary evaluation parted? Asked after each evaluation, answered from the run directory."""

    alpha: float = Field(0.05, ge=0.005, lt=1)
    """False alarms per run."""
    margin: float | None = Field(None, ge=0)
    """A drop that does not matter, in the primary evaluation's unit; null: 0.7 of its standard error."""
    action: Literal["report", "stop", "raise_kl"] = "report"
    """What is done once the primary evaluation is found to have fallen. stop: end as on SIGTERM, with a checkpoint;
    raise_kl: multiply the KL coefficient by kl_factor, and again only after the evaluation had recovered."""
    kl_factor: float = Field(4, gt=1)
    """For raise_kl; a KL target is divided by its square. Where reward and KL are in balance, sqrt(KL) goes with
    1 / coefficient for small KL. By the RL law of Gao et al. 2022 the whole gain is lost at e times the sqrt(KL) of the
    peak: a factor above e comes back from there to before the peak."""
    report_every_s: float = Field(60, ge=0)
    """The report is written anew after an evaluation, but not more often."""


class Tracking(Section):
    uri: str = "sqlite:///mlflow.db"
    experiment: str = "headroom"
    system_metrics: bool = True
    tags: dict[str, str] = {}


class RayConfig(Section):
    address: str = "local"
    """local: a private cluster on this machine; otherwise a running cluster's address."""
    placement_s: float = Field(60, gt=0)


class Offline(Section):
    """One supervised training: `headroom sft`, `headroom dpo` or one entry of `headroom reward`."""

    output: str
    data: Data
    base: str | None = None
    """Start weights; default: model.path."""
    seed: int = 0
    epochs: int = Field(1, ge=1)
    batch: int = Field(32, ge=1)
    max_length: int = Field(512, ge=2)
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts kept out to report loss, and accuracy where there are preferences."""
    loss: Literal["bradley_terry", "margin", "kwise", "dpo", "ipo"] | None = None
    """reward: bradley_terry (default), margin or kwise; dpo: dpo (default) or ipo; sft has one loss only."""
    margin_scale: float = Field(1.0, gt=0)
    """loss margin: how far apart scores are to be, in nats, for each unit of a row's margin."""
    beta: float = Field(DPO_BETA, gt=0)
    """dpo: how strongly the start weights pull; the policy that dpo aims at is proportional to π₀·exp(r / beta)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo: the share of labels that are taken to be the wrong way round (cDPO)."""
    length_normalisation: bool = False
    """dpo: log-ratios are means over tokens, not sums; what it aims at is then no longer that policy."""
    checkpoint_every: int = Field(100, ge=1)
    """Optimizer steps between checkpoints, from which a training that was killed goes on."""
    dtype: DType = "float32"
    engine: Engine = Engine()


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    sampling: SamplingParams = SamplingParams()
    loop: Loop = Loop()
    algorithm: Algorithm = Algorithm()
    learner: Engine = Engine()
    critic: Critic = Critic()
    reference: Reference = Reference()
    reward: Reward = Reward()
    generator: GeneratorConfig = GeneratorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarm: AlarmConfig = AlarmConfig()
    tracking: Tracking = Tracking()
    ray: RayConfig = RayConfig()
    sft: Offline | None = None
    dpo: Offline | None = None
    reward_models: dict[str, Offline] = {}
    """What `headroom reward` trains, by name."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, tree: Any) -> Any:
        """Replace `${data.path}` by the value of that key, so that one override reaches every place that repeats it."""
        return _resolved(tree, tree) if isinstance(tree, dict) else tree


def _resolved(value: Any, tree: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(inner, tree) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, tree) for inner in value]
    if not (isinstance(value, str) and value.startswith("${") and value.endswith("}")):
        return value
    found: Any = tree
    for part in value[2:-1].split("."):
        if not isinstance(found, dict) or part not in found:
            raise UserError(f"{value}: no such key is set in this recipe; name one that the file or command line sets")
        found = found[part]
    return found
