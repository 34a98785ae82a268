"""Stable Diffusion 1.5: what the released weights had after the paper's training, the CLIP term.

    python -m tiue_jax.main --config=configs/sd15_released.py --workdir=runs/sd15_released \
        --config.student.start=runs/sd15/student --effort=O1

10,000 iterations more with max(0, 0.35 - similarity of image and prompt), as the authors' README
says of their released weights. The LoRA teacher starts anew: let it follow first, with
--config.train.lora_warmup=500. Teacher, CLIP and TAESD come from the hub, or from folders:
--config.teacher, --config.clip.model, --config.clip.taesd.

Cost: not measured.
Expect: not measured. Published for the released SD 2.1 weights (COCO2014-30k; table 1 of
WaDi): FID 13.49, CLIP score 0.31.
"""

from ml_collections import ConfigDict

from configs import sd15


def get_config() -> ConfigDict:
    config = sd15.get_config()
    config.student.start = "runs/sd15/student"
    config.clip.tau = 0.35
    config.clip.epochs = 8.0  # theirs falls by prompts a device, of 8 devices
    config.train.iterations = 10_000
    return config
