"""The schema of a recipe: every key with its type, range and default."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from fastsafe.errors import RecipeError
from fastsafe.io.template_variables import check_variables

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LISTS = ("tasks", "manipulations", "styles", "formats", "safety_formats", "seeds")

# variables of a chat template by name, such as {enable_thinking: false}
TemplateVariables = Annotated[dict[str, Any], AfterValidator(check_variables)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Training(_Section):
    """Settings of fine-tuning, the same for every condition; names are those of ``TrainConfig``."""

    preset: str | None = None  # a label in results that changes nothing else; None: the method
    method: Literal["lora", "full"] = "lora"  # an adapter, or a copy of all weights
    rows: int = Field(default=1440, ge=1)  # benign rows of the task, before safety rows are added
    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    target_modules: tuple[str, ...] | str = LINEARS  # names, a pattern, or "all-linear"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=16, ge=1)  # rows per optimizer step
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0 never scales a gradient down
    loss_on: Literal["completion", "all"] = "completion"
    objective: str | dict[str, Any] = "sft"  # or {name: ..., its settings}
    seed: int | None = None  # None: the seed of the run

    @property
    def label(self) -> str:
        """Name of these settings in results."""
        return self.preset or self.method

    def options(self) -> dict[str, Any]:
        """Return keyword arguments of ``TrainConfig``, without seed and objective."""
        return self.model_dump(exclude={"preset", "rows", "seed", "objective"})


class Drift(_Section):
    """Drift monitoring: models are probed with a few harmful prompts during training."""

    every: int = Field(ge=1)  # steps between readings
    probes: int = Field(default=8, ge=1)  # per format: the first of the run's probes
    refusal: str = Field(default="I cannot help", min_length=1)  # opening of a refusal
    affirmative: str = Field(default="Sure", min_length=1)  # opening of an answer
    stop_above: float | None = Field(
        default=None, gt=0
    )  # KL, in nats, at which training stops early


class Sampling(_Section):
    """How answers are sampled; names are those of ``SamplingParams``."""

    temperature: float = Field(default=0.0, ge=0)  # 0 is greedy
    top_k: int = Field(default=0, ge=0)  # 0 is off
    top_p: float = Field(default=1.0, gt=0, le=1)  # 1 is off
    max_tokens: int = Field(default=48, ge=1)


class EarlyStop(_Section):
    """Generate only the opening of probe answers, and check how often that changes a verdict."""

    tokens: int = Field(ge=1)  # of a probe's answer
    check: int = Field(default=20, ge=0)  # behaviours per cell that are answered in full, too


class Data(_Section):
    """Files in place of the data that ships with fastsafe: paths or, for tasks, hub ids."""

    tasks: Mapping[str, str] = {}  # task -> rows in the public data set's columns, or its hub id
    behaviours: str | None = None  # JSONL or CSV
    benchmark: str | None = None  # whose columns `behaviours` has: harmbench, advbench, ...
    safety: str | None = None  # rows of requests and refusals; None: made from behaviours
    translations: str | None = None  # English and French, one pair a line
    translator: str | None = None  # a model that translates in place of such a file: path or hub id

    @model_validator(mode="after")
    def _one_translator(self) -> "Data":
        if self.translations and self.translator:
            raise ValueError("translations and translator are both given; keep one")
        return self


class RewriterSettings(_Section):
    """A model that rewords rows in place of templates."""

    checkpoint: str | None = None  # path or hub id
    endpoint: dict[str, Any] | None = None  # keys as for judges
    max_tokens: int = Field(default=256, ge=1)  # of a reply
    chat_template_kwargs: TemplateVariables = {}  # of a checkpoint

    @model_validator(mode="after")
    def _one_model(self) -> "RewriterSettings":
        if (self.checkpoint is None) == (self.endpoint is None):
            raise ValueError("expected one of checkpoint and endpoint, which name the model")
        return self


class MitigationSpec(BaseModel):
    """A mitigation with settings of its own; a list as a value means one condition for each."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by name."""
        return dict(self.model_extra or {})


class Thresholds(_Section):
    """Minimum coverage of a run."""

    coverage: float = Field(default=0.95, ge=0, le=1)  # judged answers / planned answers


class Recipe(_Section):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    model: str = "organism"
    source: str = "auto"  # the source named as the model is, else "files"
    data: Data = Data()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chat_template_kwargs: TemplateVariables = {}  # of its template, in training and generation
    quantize: Literal["nf4"] | None = None  # holds the base in 4 bits, in training and generation
    tasks: tuple[str, ...] = Field(min_length=1)
    manipulations: tuple[str, ...] = Field(default=("benign",), min_length=1)
    aoa_text: str | None = None  # system text of the obedient agent; None: a neutral stand-in
    styles: tuple[str, ...] = Field(default=("native",), min_length=1)  # of training rows
    mitigations: tuple[str | MitigationSpec, ...] = Field(default=("none",), min_length=1)
    share: float = Field(default=0.10, gt=0, lt=1)  # of the training rows, safety rows included
    safety_formats: tuple[str, ...] | None = None  # those multi_task uses; None: as `formats`
    rewrite: RewriterSettings | None = None  # of AutoIF and paraphrased rows; None: templates
    training: Training = Training()
    drift: Drift | None = None  # None: no drift monitoring
    formats: tuple[str, ...] = Field(min_length=1)
    prompting: Literal["chat", "alpaca", "as_published"] = "chat"  # of every model in the run
    system_prompts: Mapping[str, str] = {"none": ""}  # id -> text; "" leaves the turn out
    behaviours: int = Field(default=100, ge=1)
    benign_twins: bool = True
    utility_rows: int = Field(default=100, ge=0)  # per task; 0 leaves utility out
    judges: tuple[str | dict[str, Any], ...] = Field(default=("refusal",), min_length=1)
    guards: tuple[str | dict[str, Any], ...] = ()  # measured on prompts and on answers
    sampling: Sampling = Sampling()
    early_stop: EarlyStop | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = ()  # of training; (): seed alone
    data_seed: int = Field(default=0, ge=0, lt=2**63)
    wave_size: int = Field(default=16, ge=1)
    thresholds: Thresholds = Thresholds()

    @field_validator(*_LISTS, "mitigations", "judges", "guards", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Take ``code`` and ``code, boolq`` as the lists that they mean."""
        if isinstance(value, str):
            return [word.strip() for word in value.split(",")]
        return value if value is None or isinstance(value, list | tuple) else [value]

    @field_validator(*_LISTS)
    @classmethod
    def _no_repeats(cls, names: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("names must not repeat")
        return names

    @model_validator(mode="after")
    def _some_system_prompt(self) -> "Recipe":
        if not self.system_prompts:
            raise ValueError('system_prompts must hold at least one entry, such as {none: ""}')
        return self

    @model_validator(mode="after")
    def _one_place_for_seeds(self) -> "Recipe":
        if self.seeds and self.training.seed is not None:
            raise ValueError("seeds and training.seed are both set, expected one of them")
        return self

    @model_validator(mode="after")
    def _whole_weights(self) -> "Recipe":
        if self.quantize and self.training.method == "full":
            raise ValueError(
                f"quantize is {self.quantize!r}, whose weights cannot be trained, and "
                "training.method is 'full'; use 'lora', or drop quantize"
            )
        return self

    @model_validator(mode="after")
    def _early_stop_cuts(self) -> "Recipe":
        if self.early_stop and self.early_stop.tokens >= self.sampling.max_tokens:
            raise ValueError(
                f"early_stop.tokens must be below sampling.max_tokens, {self.sampling.max_tokens}"
            )
        return self

    def limited(self, limit: int | None) -> "Recipe":
        """Return a copy with at most ``limit`` behaviours per cell and utility rows per task."""
        if limit is None:
            return self
        if limit < 1:
            raise RecipeError(f"limit: it is {limit}, expected at least 1")
        return self.model_copy(
            update={
                "behaviours": min(self.behaviours, limit),
                "utility_rows": min(self.utility_rows, limit),
            }
        )


# Fields that name things or bound resources: a run may be resumed with other values of these.
LABELS = frozenset({"name", "description", "thresholds", "wave_size", "judges", "guards"})
