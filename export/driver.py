"""Text to video from the files of an export: what an app does, in Python. Needs NumPy, sentencepiece, ftfy, LiteRT.

    python driver.py EXPORT --prompt="a red circle moves left over a grey background" --output=out.gif

The app keeps a dictionary of named tensors and runs the parts in the manifest's order. Each part reads the tensors that
the manifest names and adds its outputs. Nothing here knows what a part computes.
"""

import argparse
import html
import itertools
import json
import pathlib
import re
import sys
from typing import Any

import ftfy
import numpy as np
import sentencepiece
from ai_edge_litert.interpreter import Interpreter

Tensors = dict[str, np.ndarray]


class Graph:
    """A part's TFLite file, as a function of named tensors."""

    def __init__(self, folder: pathlib.Path, record: dict[str, Any], threads: int):
        self.inputs, self.outputs = record["inputs"], record["outputs"]
        self.runner = Interpreter(str(folder / record["file"]), num_threads=threads).get_signature_runner()

    def __call__(self, tensors: Tensors) -> Tensors:
        outputs = self.runner(**{own: tensors[name] for name, own in self.inputs.items()})
        return {name: outputs[own] for name, own in self.outputs.items()}


class Pipeline:
    """The TFLite parts of an export folder in one precision.

    Raises FileNotFoundError where a part has no file in that precision.
    """

    def __init__(self, folder: str | pathlib.Path, precision: str = "float32", threads: int = 2):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        records = {
            record["part"]: record
            for record in self.manifest["artefacts"]
            if (record["format"], record["precision"]) == ("tflite", precision)
        }
        missing = [part["name"] for part in self.manifest["parts"] if part["name"] not in records]
        if missing:
            raise FileNotFoundError(f"{self.folder}: no {precision} TFLite file of {', '.join(missing)}")
        self.graphs = {name: Graph(self.folder, record, threads) for name, record in records.items()}

    def run(self, step: str, tensors: Tensors) -> Tensors:
        """The tensors, with outputs of all parts of a step ("once a prompt", "every step" or "once a video") added."""
        for part in self.manifest["parts"]:
            if part["step"] == step:
                tensors = tensors | self.graphs[part["name"]](tensors)
        return tensors

    def tokens(self, prompt: str) -> Tensors:
        """Token ids and mask, both [1, L], of the prompt after Wan's text cleaning."""
        settings = self.manifest["tokenizer"]
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / settings["file"]))
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        ids = [*pieces.encode(re.sub(r"\s+", " ", text).strip())[: settings["length"] - 1], settings["end"]]
        padding = settings["length"] - len(ids)
        return {
            "token_ids": np.array([ids + [settings["padding"]] * padding], np.int32),
            "mask": np.array([[1.0] * len(ids) + [0.0] * padding], np.float32),
        }

    def velocity(self, latents: np.ndarray, timestep: float, text_embeddings: np.ndarray) -> np.ndarray:
        """The transformer's output [T, H, W, C] for one prompt, without guidance."""
        inputs = {"latents": latents, "timestep": np.array([timestep], np.float32), "text_embeddings": text_embeddings}
        return self.run("every step", inputs)["velocity"]

    def __call__(self, prompt: str, noise: np.ndarray, fresh_noise: np.ndarray | None = None) -> np.ndarray:
        """The video, uint8 [F, H, W, 3], that a prompt and noise [T, H, W, C] give.

        `fresh_noise` [steps, T, H, W, C] is used by solvers that add noise at every step; None: drawn by step number.
        Raises ArithmeticError, which names the step, where numbers are not finite.
        """
        sampler = self.manifest["sampler"]
        guidance, rows = sampler["guidance"], sampler["schedule"]
        text = self.run("once a prompt", self.tokens(prompt))["text_embeddings"]
        if guidance != 1:
            negative_text = self.run("once a prompt", self.tokens(sampler["negative_prompt"]))["text_embeddings"]
        x = noise.astype(np.float32)
        previous, older, last = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for i in range(sampler["steps"]):
            velocity = self.velocity(x, rows["timestep"][i], text)
            if guidance != 1:
                negative = self.velocity(x, rows["timestep"][i], negative_text)
                velocity = negative + guidance * (velocity - negative)
            data = x - np.float32(rows["sigma"][i]) * velocity
            corrected = combine(rows["corrector"][i], x, previous, older, last, data)
            x = combine(rows["predictor"][i], corrected, last, data)
            if rows["renoise"][i]:
                drawn = np.random.default_rng(i).standard_normal(x.shape) if fresh_noise is None else fresh_noise[i]
                x = (x + rows["renoise"][i] * drawn).astype(np.float32)
            if not np.isfinite(x).all():
                raise ArithmeticError(f"step {i + 1} of {sampler['steps']}: the latents are not finite")
            previous, older, last = corrected, last, data
        video = self.run("once a video", {"latents": x})["video"]
        if not np.isfinite(video).all():
            raise ArithmeticError("the decoded video is not finite")
        return np.round((video + 1) * 127.5).astype(np.uint8)


def combine(weights: list[float], *terms: np.ndarray) -> np.ndarray:
    """The weighted sum of the terms, in float32."""
    total = np.zeros_like(terms[0])
    for weight, term in zip(weights, terms, strict=True):
        total += np.float32(weight) * term
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Text to video from the files of an export.")
    parser.add_argument("folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="out.gif", help=".gif, or .npy for the frames")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        pipeline = Pipeline(options.folder, options.precision)
    except FileNotFoundError as error:
        sys.exit(str(error))
    shape = pipeline.manifest["tensors"]["latents"]["shape"]
    try:
        video = pipeline(options.prompt, np.random.default_rng(options.seed).standard_normal(shape))
    except ArithmeticError as error:
        sys.exit(f"{options.folder}: {error}")
    if options.output.endswith(".npy"):
        np.save(options.output, video)
        return
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in video)
    # A GIF counts in hundredths of a second: durations differ by one of them, so that their mean is right.
    ends = [round(100 * number / pipeline.manifest["video"]["fps"]) for number in range(len(video) + 1)]
    durations = [10 * max(2, after - before) for before, after in itertools.pairwise(ends)]
    first.save(options.output, save_all=True, append_images=rest, duration=durations, loop=0)


if __name__ == "__main__":
    main()
