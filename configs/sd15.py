"""Stable Diffusion 1.5 to a one-pass student: the paper's recipe.

    python -m tiue_jax.main --config=configs/sd15.py --workdir=runs/sd15 \
        --config.data.source=train_anno.jsonl --effort=O1

The teacher comes from the hub (stable-diffusion-v1-5/stable-diffusion-v1-5), or from a folder that
--config.teacher names; the prompts are JourneyDB's captions.

Cost: not measured. Eight TPU v5e chips hold it and take ten hours at least; docs/scaling.md has
other slices, and why --effort=O1 is for TPUs. The paper took 66.5k iterations of 64 images on 8
GPUs.
Expect: not measured. Published for SD 2.1 with the CLIP loss (COCO2014-30k; table 1 of WaDi):
FID 13.49, CLIP score 0.31.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.data.source = "data/journeydb/train_anno.jsonl"
    config.data.field = "Task2.Caption"
    config.mesh.fsdp = -1  # the state, 14 GB, is split over 8 devices where there are 8
    return config
