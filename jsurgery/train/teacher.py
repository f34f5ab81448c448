"""The command `train`: trains a tiny Wan from scratch, as a complete pipeline folder of diffusers."""

from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.data.latents import encode_sprites
from jsurgery.io.files import replacing
from jsurgery.io.hashes import files
from jsurgery.runtime.lock import locked
from jsurgery.train.transformer import train_transformer
from jsurgery.train.vae import train_vae
from jsurgery.wan.checkpoint import load_vae, save_text_encoder, save_transformer
from jsurgery.wan.model_folder import model_path
from jsurgery.wan.pipeline_parts import write_pipeline_index
from jsurgery.wan.tokenizer import Tokenizer, train_tokenizer

HOLDOUT_SEED = 1  # added to the seed for the set of scenes that validation clips come from


def train_teacher(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Trains, or continues where a run stopped; returns the model folder. Raises InputError if another run uses it."""
    workdir = epath.Path(workdir)
    with locked(workdir):
        return train_parts(config, workdir, workdir / "model")


def train_parts(config: ConfigDict, workdir: epath.Path, model: epath.Path) -> epath.Path:
    """Makes the missing parts: tokenizer, VAE, encoded clips, transformer with text encoder, pipeline index."""
    init = model_path(config.train.init) if config.train.init else None
    for part in ("tokenizer", "vae"):
        if init is not None:
            copy_folder(init / part, model / part)
    if not (model / "tokenizer" / "spiece.model").exists():
        train_tokenizer(sprites.all_captions(), model / "tokenizer", vocab_size=config.train.vocabulary)
    if not (model / "vae" / "config.json").exists():
        train_vae(config, workdir, model / "vae")

    vae, latents = load_vae(model / "vae"), workdir / "latents"
    common = {"video": config.video, "two_sprites": config.data.two_sprites}
    holdout = config.train.holdout_clips
    encode_sprites(vae, latents / "holdout", seed=config.seed + HOLDOUT_SEED, clips=holdout, **common)
    encode_sprites(vae, latents / "train", seed=config.seed, clips=config.train.clips, **common)

    tokenizer = Tokenizer(model / "tokenizer")
    teacher = train_transformer(config, workdir, tokenizer=tokenizer, latents=latents, init=init)
    save_transformer(teacher.transformer, model / "transformer")
    save_text_encoder(teacher.text_encoder, model / "text_encoder")
    write_pipeline_index(model, shift=config.sampler.shift)
    return model


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies the missing files of a folder, either of which may be on gs://."""
    for name in files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).exists():
            with replacing(target / name) as temporary:
                (source / name).copy(temporary, overwrite=True)
