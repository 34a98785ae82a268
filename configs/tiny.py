"""The embedded teacher to a one-pass student, on two CPU cores.

    python -m tiue_jax.main --config=configs/tiny.py --workdir=runs/tiny

Cost: not measured yet.
Expect: not measured yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.teacher = "assets/tiny-sd"
    config.data.source = "assets/tiny-scenes/prompts.txt"

    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.targets = ("to_q", "to_k", "to_v", "to_out_0")
    config.vsd.guidance_scale = 1.5

    config.train.iterations = 1000
    config.train.batch_size = 32
    config.train.student_lr = 2e-5
    config.train.lora_warmup = 100
    config.train.ema_max_decay = 0.99
    config.train.compute_dtype = "float32"
    config.train.remat = False

    config.log.every = 10
    config.log.summary_every = 100
    config.log.validation_prompts = (
        "a red circle above a blue square",
        "a large green triangle",
        "a small yellow square to the left of a purple circle",
        "two blue circles",
    )
    config.checkpoint.every = 100
    config.checkpoint.keep = 2
    return config
