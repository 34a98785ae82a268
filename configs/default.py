"""Every option of `tiue_jax.main`, with the paper's values; the other configs say what differs.

A teacher and prompts have to be named:

    python -m tiue_jax.main --config=configs/default.py --workdir=runs/mine \
        --config.teacher=FOLDER --config.data.source=prompts.txt

Any value can be overridden so. Keys that are not here, and values of another type, are refused.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the LoRA's start, of every draw of the training, of validation noise
    config.teacher = ""  # folder of a Stable Diffusion, or a hub's owner/name[@revision]

    config.data = ConfigDict()
    config.data.source = ""  # .txt, .jsonl, .json (COCO's captions), tfds:NAME[:split][:field]
    config.data.field = ""  # of a JSON object ("Task2.Caption") or data set; "": the usual one
    config.data.deduplicate = True  # keep the first of equal prompts
    config.data.shuffle_seed = 2023  # order of the prompts, another one in every epoch

    config.student = ConfigDict()
    config.student.start = ""  # folder or hub id whose UNet the student starts as; "": the teacher
    config.student.num_steps = 4  # K, decoder timesteps that run in parallel
    config.student.timestep_spacing = "leading"  # leading, trailing or linspace

    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 108.0  # the update is alpha / rank * A B
    config.lora.targets = ("to_q", "to_v")  # which projections of every attention are adapted

    config.vsd = ConfigDict()
    config.vsd.guidance_scale = 4.5  # w of the teacher
    # w of the LoRA teacher: as the teacher's unless given. The student then ends at the teacher's
    # unguided pictures; with 1 it ends at the guided ones.
    config.vsd.lora_guidance_scale = config.vsd.get_oneway_ref("guidance_scale")
    config.vsd.t_min = 20  # timesteps are drawn from t_min..t_max, both included
    config.vsd.t_max = 980

    config.kl = ConfigDict()
    config.kl.weight = 0.1  # lambda_kl, on a SUM over the K noise maps of `batch` images
    config.kl.batch = 8  # the paper's images a device; 0: the whole batch, however large

    config.clip = ConfigDict()  # max(0, tau - similarity of image and prompt)
    config.clip.tau = 0.0  # 0: no such term, as in the paper
    config.clip.weight = 0.1  # at the start, falling linearly to 0 ...
    config.clip.epochs = 1.0  # ... in so many epochs of prompts
    config.clip.source_faithful = True  # pixels reach CLIP in [0, 1]; False: normalised as CLIP's
    # Folders or hub ids. CLIP's main branch has pickles only; this one has them as safetensors.
    config.clip.model = "openai/clip-vit-base-patch32@refs/pr/15"
    config.clip.taesd = "madebyollin/taesd"

    config.train = ConfigDict()
    config.train.iterations = 66_503  # three epochs of JourneyDB's 1,418,723 captions
    config.train.batch_size = 64  # over all devices
    config.train.student_lr = 1e-6
    config.train.student_lr_end = 1.0  # fraction of it that it falls to, linearly
    config.train.lora_lr = 1e-3
    config.train.lora_warmup = 0  # first iterations, in which the LoRA teacher learns alone
    config.train.student_every = 1  # afterwards the student learns in every so-manieth iteration
    config.train.clip_grad_norm = 1.0  # global norm, student and LoRA each
    config.train.null_prompt_prob = 0.1  # how often the LoRA's loss sees the empty prompt
    config.train.ema_max_decay = 0.9999  # decay is min(this, (1 + n) / (10 + n)) after n updates
    config.train.compute_dtype = "bfloat16"  # or float32; what learns, and losses, are float32
    # What the frozen teacher is kept in; half of a float32's bytes where it is computed in halves.
    config.train.teacher_dtype = config.train.get_oneway_ref("compute_dtype")
    # What going back computes again, for less memory: none, attention (every transformer block),
    # matmuls (all but the results of convolutions and projections), or blocks (everything).
    config.train.remat = "blocks"
    config.train.accumulate = 1  # parts that a batch is computed in, one after the other

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that are left
    config.mesh.fsdp = 1  # devices that split batch and weights; both -1: up to 8 of them
    config.mesh.shard_teacher = True  # the frozen teacher too; False: whole on every device

    config.log = ConfigDict()
    config.log.every = 50  # iterations between lines of metrics.jsonl, TensorBoard and the bar
    config.log.summary_every = 500  # iterations between image grids; 0: none
    config.log.stuck_after = 1800  # seconds without a step, after which stacks are shown; 0: never
    config.log.validation_prompts = (  # of the image grids, always from the same noise
        "a red cube on a blue table",
        "a photo of a waterfall surrounded by rocks",
        "an oil painting of a fox in the snow",
        "a cup of coffee beside an open book, morning light",
    )

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # iterations; the last one is always saved
    config.checkpoint.keep = 3  # how many of the latest are kept
    return config.lock()
