"""Write the distillation prompts: training captions, each once, none that evaluation uses.

python -m examples.tiny_sd.prompts --out=FILE     assets/tiny-scenes/prompts.txt again
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from examples.tiny_sd.captions import caption
from examples.tiny_sd.measure import evaluation_set
from examples.tiny_sd.scenes import sample_scenes
from tiue_jax.io.errors import run_command
from tiue_jax.io.files import require_absent, write_atomic

FLAGS = flags.FLAGS
SEED = 930_001
CHUNK = 1000


def training_prompts(number: int) -> list[str]:
    """Different captions of scenes with seen pairs; the first do not depend on the number."""
    taken = {request.text for request in evaluation_set()[1]}
    rng = np.random.default_rng(SEED)
    prompts: list[str] = []
    while len(prompts) < number:
        for scene in sample_scenes(rng, CHUNK):
            text = caption(scene, rng)
            if text not in taken:
                taken.add(text)
                prompts.append(text)
    return prompts[:number]


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("out", None, "new text file, one prompt a line", required=True)
    flags.DEFINE_integer("number", 20_000, "prompts to write", 1, 200_000)


def main(argv: Sequence[str]) -> None:
    """Write the file."""
    del argv
    require_absent(FLAGS.out, key="--out")
    write_atomic(FLAGS.out, "".join(f"{p}\n" for p in training_prompts(FLAGS.number)))
    print(f"wrote {FLAGS.number} prompts to {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
