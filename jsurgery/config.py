"""The schema of a config, and every rule that a config must satisfy.

`base()` holds each field with its default and its meaning; the files in `configs/` change values, never add fields.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from jsurgery.errors import InputError


def base() -> ConfigDict:
    """Every field. The values are the paper's where it states them (Wan2.1 1.3B at 320x480, 81 frames)."""
    c = ConfigDict()
    c.seed = 0  # of all noise, of initial feature maps and of the order of the data
    c.prompts = "prompts.txt"  # one prompt a line; "sprites": captions of the procedural set

    c.model = ConfigDict()
    c.model.path = ""  # a model folder; "tiny_wan" is the bundled teacher
    c.model.kind = ""  # which published model it is, where its files do not tell (`jsurgery models`)
    c.model.lora = ()  # LoRA files that are merged into the transformer's weights
    c.model.lora_scale = ()  # the factor of each; (): 1
    c.model.dtype = "float32"  # of matmuls; trained parameters stay float32
    c.model.vae_dtype = "float32"  # of the VAE; "bfloat16" halves its memory (at 58 dB PSNR on the bundled model)
    c.model.remat = "none"  # what the backward pass recomputes: whole "blocks", or all but matrix products ("matmuls")

    c.mesh = ConfigDict()  # devices along each axis, 0 being 1; all 0: every stage takes all devices and chooses axes
    c.mesh.data = 0  # divides examples
    c.mesh.fsdp = 0  # divides examples, and parameters with their optimiser state
    c.mesh.context = 0  # divides the tokens of an example
    c.mesh.tensor = 0  # divides heads
    c.mesh.exchange = "gather"  # how attention reaches the keys of other shards; "all_to_all" divides the heads instead

    c.video = ConfigDict()
    c.video.frames = 81  # 4k + 1
    c.video.height = 320  # pixels, a multiple of 16
    c.video.width = 480  # pixels, a multiple of 16
    c.video.fps = 16  # frames a second, in videos that are written and in clips that `encode` reads
    c.text_length = 512  # text tokens, zero-padded

    c.sampler = ConfigDict()
    c.sampler.solver = "euler"  # "unipc" is Wan's own; "lcm" that of consistency and DMD models
    c.sampler.steps = 50  # of the solver, from noise to video
    c.sampler.timesteps = ()  # what the steps start from, 1000 first, as few-step models have them; (): by the solver
    c.sampler.shift = 3.0  # of the noise levels: a larger one has more steps at high noise
    c.sampler.guidance = 5.0  # 1: the prompt alone, one velocity a step
    c.sampler.guidance_batched = True  # False: the two velocities one after the other, in half the memory
    c.sampler.negative_prompt = ""  # what guidance leads away from
    c.sampler.noise = "video"  # how noise is drawn: for a video at once, or for each latent "frame", as streams need it

    c.hybrid = ConfigDict()
    c.hybrid.rates = (2, 4, 8, "linear")  # candidates, distilled in one pass; also "C3O1" (chunked), "S10" (sparse)
    c.hybrid.stabilizer = "lse"  # "max" is the paper's
    c.hybrid.lattice = "strided"  # every R-th token; "staggered" moves them a column a frame, "staggered_rows" a row
    c.hybrid.linear_branch = True  # False: softmax over the kept tokens alone, a control
    c.hybrid.degree = 2  # of the feature map: the powers 1 to this of its outputs
    c.hybrid.layers = 2  # of the feature map
    c.hybrid.activation = "relu"  # "hedgehog" is that map instead, of degree 1 and one layer

    c.trace = ConfigDict()
    c.trace.prompts = 512  # the first so many of `prompts`
    c.trace.holdout = 16  # prompts kept for the errors; never trained on
    c.trace.solver = "euler_ancestral"  # of the teacher's trajectories
    c.trace.keep_steps = 50  # of the sampler's steps, evenly spread
    c.trace.batch = 1  # prompts sampled at once

    c.distill = ConfigDict()
    c.distill.mode = "traces"  # "sampling": no traces; maps learn from the forwards while the teacher samples
    c.distill.trajectories = 4  # for "sampling": batches of prompts sampled at once, one step of each in turn
    c.distill.loss = "value"  # "attention" is eq. 6
    c.distill.steps = 10_000  # updates in all
    c.distill.updates_per_batch = 1  # U of Algorithm 1
    c.distill.batch = 1  # examples in an update
    c.distill.learning_rate = 1e-3  # of AdamW
    c.distill.weight_decay = 0.0  # of AdamW
    c.distill.calibrate = True  # scales initial maps so that linear keys have the mean mass that the teacher gives them
    c.distill.error_steps = 0  # held-out steps for the errors of the attention, evenly spread; 0: all
    c.distill.velocity_steps = 8  # held-out steps for the error of the velocity, with each block converted alone
    c.distill.blocks = ""  # the blocks of this job ("0-9", "0,3,5"), one of several that `plan` merges; "": all

    c.plan = ConfigDict()
    c.plan.rates = (1, 2, 4, 8)  # what the planner may choose; 1 keeps softmax
    c.plan.budget = FieldReference("15R2", object)  # or a share of the teacher's attention FLOPs (0.6), or FLOPs (> 1)
    c.plan.costs = ""  # a JSON of measured costs instead of FLOPs (`read_costs`); a budget > 1 is in its unit
    c.plan.errors = "velocity"  # adds up squared errors of the velocity; "attention": the paper's errors of each block
    c.plan.selection = "heterogeneous"  # "homogeneous": "15R2" is exactly 15 blocks at rate 2

    c.finetune = ConfigDict()
    c.finetune.steps = 1000  # 0: the model is left as `operate` made it
    c.finetune.batch = 16  # clips in a step
    c.finetune.lora_rank = 0  # trains low-rank changes of this rank and the feature maps alone; 0: all parameters
    c.finetune.learning_rate = 1e-5  # of AdamW; low-rank changes take some ten times as much
    c.finetune.weight_decay = 0.0  # of AdamW
    c.finetune.schedule = "constant"  # "cosine": down to zero at the last step
    c.finetune.warmup = 0  # steps over which the learning rate rises from zero
    c.finetune.clip_norm = 1.0  # the largest norm of a step's gradients; larger ones are scaled down to it
    c.finetune.accumulate = 1  # computes a batch in this many pieces, one after another, to save memory
    c.finetune.ema = 0.0  # decay of averaged weights, which become the result; 0: the last weights are the result
    c.finetune.teacher_weight = 0.0  # 0: flow matching on data; 1: the teacher's velocity; between: a mix
    c.finetune.condition_dropout = 0.1  # share of the clips that are trained without their caption, for guidance
    c.finetune.subject = "hybrid"  # "teacher": a control: the unchanged teacher is trained in the same way
    c.finetune.distilled = True  # False: feature maps as initialised (the paper's "no distillation")

    c.data = ConfigDict()
    c.data.path = ""  # a folder of encoded latents; "sprites": encoded on the spot from the procedural set
    c.data.clips = 0  # for "sprites"
    c.data.two_sprites = 0.25  # share of clips with two sprites
    c.data.buckets = "one"  # `encode`: clips of the size of `video`; "several": also shorter, upright and square clips
    c.data.posterior = "mean"  # "sample": drawn once, when encoded
    c.data.max_crop = 0.4  # share of a frame that may be cut off; a clip that would lose more is skipped
    c.data.max_upscale = 1.5  # a clip that would be enlarged more is skipped
    c.data.max_skipped = 0.5  # `encode` stops when a larger share of the clips is skipped
    c.data.clips_per_shard = 128  # clips in a file of encoded clips
    c.data.batch = 1  # clips that `encode` and `synthesize` compute at once, or more where devices would be idle
    c.data.workers = 8  # processes that decode

    c.evaluate = ConfigDict()
    c.evaluate.prompts = 16  # sampled from every model; they follow those of `trace.prompts`
    c.evaluate.batch = 4  # prompts sampled at once, or more where devices would be idle
    c.evaluate.validation_clips = 64  # held out, for the validation loss
    c.evaluate.videos = 6  # shown in the report

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # steps from one checkpoint to the next
    c.checkpoint.minutes = 0.0  # also when the last one is this old; 0: by steps alone
    c.checkpoint.keep = 2  # the newest
    c.checkpoint.keep_every = 0  # also keeps every N-th step; 0: none
    c.checkpoint.on_damage = "stop"  # if the newest checkpoint is damaged; "older": goes on from the newest intact one
    c.max_skipped = 0  # batches with a non-finite loss or gradient that training skips before it stops
    c.log_every = 10  # steps from one line of progress and metrics to the next
    c.compile_cache = True  # compiled programs are kept in the user's cache folder: a second run compiles nothing
    c.profile = 0  # steps of `distill` and `finetune`, after the first, that jax.profiler traces into profile/

    c.train = ConfigDict()  # `jsurgery train`: a tiny teacher
    c.train.init = ""  # a pipeline folder to go on from, with its tokenizer and VAE; "": from scratch
    c.train.vae_base_dim = 16  # channels of the VAE's first level
    c.train.vae_res_blocks = 2  # residual blocks of each level of the VAE
    c.train.z_dim = 16  # channels of the latents
    c.train.vae_steps = 2000  # updates of the VAE
    c.train.vae_batch = 4  # crops in an update
    c.train.vae_learning_rate = 5e-3  # its peak, after a twentieth of the steps; then a cosine down to zero
    c.train.vae_kl_weight = 1e-4  # weight of the divergence of the latents from a normal distribution
    c.train.vae_crop = (9, 80, 80)  # frames, height and width of a crop
    c.train.vocabulary = 64  # pieces of the tokenizer
    c.train.text_dim = 64  # width of the text encoder
    c.train.text_layers = 2  # of the text encoder
    c.train.clips = 4096  # procedural clips to train on
    c.train.holdout_clips = 256  # held out, for the validation loss
    c.train.layers = 6  # blocks of the transformer
    c.train.heads = 4  # of each block
    c.train.head_dim = 32  # channels of a head
    c.train.ffn_dim = 512  # width inside the MLP of a block
    c.train.steps = 6000  # updates of transformer and text encoder
    c.train.batch = 16  # clips in an update
    c.train.optimizer = "muon"  # of the transformer
    c.train.learning_rate = 2e-3  # its peak
    c.train.warmup = 100  # steps over which the learning rate rises from zero
    c.train.decay = 1000  # steps of the decay to zero at the end
    c.train.ema = 0.999  # decay of the averaged weights
    c.train.shift = 3.0  # of the training noise levels
    c.train.condition_dropout = 0.1  # share of the clips that are trained without their caption, for guidance
    return c.lock()  # against misspelt fields in config files; values may be set


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.vae_dtype": ("float32", "bfloat16"),
    "mesh.exchange": ("gather", "all_to_all"),
    "model.remat": ("none", "blocks", "matmuls"),
    "sampler.solver": ("euler", "euler_ancestral", "unipc", "lcm"),
    "sampler.noise": ("video", "frame"),
    "trace.solver": ("euler", "euler_ancestral", "lcm"),
    "hybrid.stabilizer": ("max", "lse"),
    "hybrid.lattice": ("strided", "staggered", "staggered_rows"),
    "hybrid.activation": ("relu", "softplus", "exp", "sigmoid", "elu1", "hedgehog"),
    "distill.mode": ("traces", "sampling"),
    "distill.loss": ("value", "attention"),
    "finetune.schedule": ("constant", "cosine"),
    "checkpoint.on_damage": ("stop", "older"),
    "plan.errors": ("velocity", "attention"),
    "plan.selection": ("heterogeneous", "homogeneous"),
    "finetune.subject": ("hybrid", "teacher"),
    "data.buckets": ("one", "several"),
    "data.posterior": ("mean", "sample"),
    "train.optimizer": ("adamw", "muon"),
}
SHARES = (
    "finetune.teacher_weight", "finetune.condition_dropout", "data.two_sprites", "data.max_crop", "data.max_skipped",
    "train.ema", "finetune.ema",
)  # fmt: skip
MAY_BE_ZERO = {
    "seed", "data.clips", "distill.steps", "finetune.steps", "evaluate.videos", "train.warmup", "train.decay",
    "distill.weight_decay", "distill.error_steps", "distill.velocity_steps", "finetune.weight_decay", "finetune.warmup",
    "train.vae_kl_weight", "profile", "checkpoint.keep_every", "checkpoint.minutes", "max_skipped",
    "mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor", "finetune.lora_rank", *SHARES,
}  # fmt: skip


LARGEST, LARGEST_COUNT = 1e30, 10**9

# A workdir, a video and a measurement record the config that they were made with. They must stay valid when a field is
# added: a later field is recorded only where it differs from the value given here, which must mean "as before".
LATER_FIELDS: dict[str, Any] = {
    "distill.mode": "traces",
    "distill.error_steps": 0,
    "finetune.lora_rank": 0,
    "model.kind": "",
    "model.lora": (),
    "model.lora_scale": (),
    "model.vae_dtype": "float32",
    "sampler.timesteps": (),
    "sampler.noise": "video",
}
RATES = ("hybrid.rates", "plan.rates")  # lists of numbers and of names of kinds
# Fields whose default is an empty list -> the type of what it may hold.
ITEMS: dict[str, type] = {"sampler.timesteps": float, "model.lora": str, "model.lora_scale": float}
# A field that has an effect only where another field has a certain value is recorded only there.
EFFECTIVE_WHERE = {"distill.trajectories": ("distill.mode", "sampling")}


def validate(config: ConfigDict) -> None:
    """Raises InputError naming the first field that is out of range, its value and what is allowed."""
    for field, value in flatten(config):
        if isinstance(value, str):
            check_text(f"config.{field}", value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not 0 <= value < math.inf or (value == 0 and field not in MAY_BE_ZERO):
                raise InputError(f"config.{field}: expected a positive number, found {value}")
            largest = LARGEST_COUNT if isinstance(value, int) and field not in ("seed", "plan.budget") else LARGEST
            if value > largest:
                raise InputError(f"config.{field}: expected at most {largest:.0e}, found {str(value)[:40]}")
            if field in SHARES and value > 1:
                raise InputError(f"config.{field}: expected a share between 0 and 1, found {value}")
        if field in CHOICES and value not in CHOICES[field]:
            raise InputError(f"config.{field}: expected one of {', '.join(CHOICES[field])}; found {value!r}")
    budget = config.plan.budget
    if isinstance(budget, bool) or not isinstance(budget, str | int | float):
        raise InputError(f"config.plan.budget: expected a number or a name like '15R2', found {budget!r}")
    if config.seed >= 2**32:
        raise InputError(f"config.seed: expected less than 2^32, found {config.seed}")
    block_numbers(config.distill.blocks)
    crop = config.train.vae_crop
    if len(crop) != 3 or any(type(size) is not int or not 1 <= size <= LARGEST_COUNT for size in crop):
        raise InputError(f"config.train.vae_crop: expected frames, height and width, found {crop}")
    check_video(*crop, prefix="config.train.vae_crop: ", multiple=8)
    check_video(config.video.frames, config.video.height, config.video.width, prefix="config.video.")
    check_kinds(config)
    if config.hybrid.activation == "hedgehog":
        for field in ("degree", "layers"):
            if config.hybrid[field] != 1:
                raise InputError(f"config.hybrid.{field}: HedgeHog has 1, found {config.hybrid[field]}")
    loras, scales = config.model.lora, config.model.lora_scale
    if scales and len(scales) != len(loras):
        raise InputError(f"config.model.lora_scale: expected one for each of {len(loras)} LoRAs, found {len(scales)}")
    if not all(abs(scale) <= LARGEST for scale in scales):
        raise InputError(f"config.model.lora_scale: expected finite numbers, found {scales}")
    check_timesteps(config.sampler.timesteps, config.sampler.steps)
    if config.trace.keep_steps > config.sampler.steps:
        raise InputError(
            f"config.trace.keep_steps: {config.trace.keep_steps} of config.sampler.steps = {config.sampler.steps}"
        )
    if config.finetune.batch % config.finetune.accumulate:
        raise InputError(
            f"config.finetune.accumulate: expected a divisor of config.finetune.batch = {config.finetune.batch}, "
            f"found {config.finetune.accumulate}"
        )
    if config.distill.mode == "sampling" and config.distill.updates_per_batch > 1:
        raise InputError(
            "config.distill.updates_per_batch: 'sampling' passes every latent once: expected 1, "
            f"found {config.distill.updates_per_batch}"
        )
    if config.trace.holdout >= config.trace.prompts:
        raise InputError(
            f"config.trace.holdout: {config.trace.holdout} of {config.trace.prompts} prompts leaves none to train on"
        )


def check_kinds(config: ConfigDict) -> None:
    """Raises InputError for candidates that no family knows, or that the other fields do not allow."""
    from jsurgery.attention.kinds.registry import (  # imports JAX, which commands' help does not need
        check_rates,
        kind_of,
    )

    check_rates("config.hybrid.rates", config.hybrid.rates)
    check_rates("config.plan.rates", config.plan.rates)
    if 1 in config.hybrid.rates:
        raise InputError(
            "config.hybrid.rates: 1 is full softmax, which has nothing to distil; leave it to config.plan.rates"
        )
    for rate in config.plan.rates:
        if not (config.hybrid.linear_branch or kind_of(rate).has_softmax):
            raise InputError(f"config.plan.rates: {rate!r} needs config.hybrid.linear_branch=True")
    if config.plan.errors == "velocity" and not config.distill.velocity_steps:
        raise InputError(
            "config.distill.velocity_steps: expected at least 1, as config.plan.errors is 'velocity'; found 0"
        )
    for rate in config.plan.rates:
        if rate != 1 and rate not in config.hybrid.rates:
            raise InputError(f"config.plan.rates: rate {rate} is not among config.hybrid.rates {config.hybrid.rates}")
    for rate in config.hybrid.rates:
        if config.distill.loss not in (losses := kind_of(rate).losses):
            raise InputError(
                f"config.distill.loss: {rate!r} in config.hybrid.rates can be distilled by {' or '.join(losses)}, "
                f"found {config.distill.loss!r}"
            )


def check_timesteps(timesteps: Sequence[float], steps: int) -> None:
    """Raises InputError unless there are none, or one for each step, falling from at most 1000 to above 0."""
    if not timesteps:
        return
    falling = all(earlier > later for earlier, later in itertools.pairwise((*timesteps, 0.0)))
    if not falling or timesteps[0] > 1000:
        raise InputError(
            f"config.sampler.timesteps: expected numbers that fall from 1000 to above 0, found {timesteps}"
        )
    if len(timesteps) != steps:
        raise InputError(f"config.sampler.timesteps: {len(timesteps)} of them for config.sampler.steps = {steps}")


def check_text(field: str, text: str) -> None:
    """Raises InputError for what cannot be written as UTF-8, or not into the name of a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{field}: expected text in UTF-8, found {text[error.start]!r}") from None
    if "\0" in text:
        raise InputError(f"{field}: expected a text, found one with a null byte")


def check_video(frames: int, height: int, width: int, prefix: str = "", multiple: int = 16) -> None:
    """Frames are 4k + 1 (the VAE's first frame stands alone), sizes multiples of 16 (8 for the VAE, 2 for patches)."""
    if frames % 4 != 1:
        below = max(1, (frames - 1) // 4 * 4 + 1)
        raise InputError(f"{prefix}frames: expected 4k + 1, found {frames}; the nearest are {below} and {below + 4}")
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            below = max(multiple, size // multiple * multiple)
            nearest = f"the nearest are {below} and {below + multiple}"
            raise InputError(f"{prefix}{name}: expected a multiple of {multiple}, found {size}; {nearest}")


def block_numbers(text: str) -> tuple[int, ...] | None:
    """`config.distill.blocks`: "0-2,5" -> (0, 1, 2, 5); "" -> None, all of them."""
    if not text:
        return None
    numbers = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise InputError(f"config.distill.blocks: expected numbers and ranges like '0-9,12', found {text!r}")
        numbers |= set(range(first, last + 1))
    return tuple(sorted(numbers))


def recorded_fields(config: ConfigDict, fields: Sequence[str], without: Sequence[str] = ()) -> dict[str, Any]:
    """What a result records of the config: `fields` (whole sections or single fields), but none of `without`.

    Fields of LATER_FIELDS with their old value and those of EFFECTIVE_WHERE without effect are left out.
    """
    values = dict(flatten(config))

    def counts(field: str) -> bool:
        if field in LATER_FIELDS and values[field] == LATER_FIELDS[field]:
            return False
        other, value = EFFECTIVE_WHERE.get(field, (field, values[field]))
        return values[other] == value

    covers = lambda field, names: any(field == name or field.startswith(name + ".") for name in names)
    return {
        field: value
        for field, value in values.items()
        if covers(field, fields) and not covers(field, without) and counts(field)
    }


def recorded_section(config: ConfigDict, section: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The `recorded_fields` of one section, named without it: {"steps": 50, ...}; so are those of `without`."""
    fields = recorded_fields(config, [section], [f"{section}.{name}" for name in without])
    return {field.removeprefix(section + "."): value for field, value in fields.items()}


def flatten(config: ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted field, value) of every leaf, in order."""
    leaves = []
    for name, value in config.items():
        leaves += flatten(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [(prefix + name, value)]
    return leaves
