"""Every key of a config, its meaning and unit, with the paper's values.

An experiment is a file beside this one that changes a few keys; any key can also be set
on the command line, as in ``--config.num_stages=4``.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the paper's training settings, for ResNet-20 on CIFAR-10 with K = 2."""
    config = ml_collections.ConfigDict()

    # "train"; "evaluate" prints the test accuracy of what a workdir holds; "export"
    # writes it there as safetensors and for Orbax.
    config.mode = "train"

    # What is trained. Names: fdg_jax.models and fdg_jax.data list theirs.
    config.network = "resnet20"
    config.init = "torch"  # parameters: "torch" (U(±1/sqrt(fan_in))) or "he_normal"
    config.init_from = config_dict.placeholder(str)  # workdir of a run to start from
    config.dropout_rate = 0.0  # share of activations dropped, in networks that have any
    config.dtype = "float32"  # of activations: "float32", "bfloat16" or "float16"
    config.param_dtype = "float32"  # of parameters: "float32" or "bfloat16"

    # On what. None: where TFDS keeps its data (~/tensorflow_datasets).
    config.dataset = "cifar10"
    config.data_dir = config_dict.placeholder(str)
    config.num_train = 0  # training images, evenly from all classes; 0: all there are

    # How the network is decoupled. fdg_jax/methods has a page on each method; "auto" is
    # what the method sets, and what it does not leave open cannot be changed.
    config.method = "fdg"  # bp, dp, gpipe, pipedream, ddg, fr, dgl, adl or fdg
    config.num_stages = 2  # K, one device each
    config.cuts = "paper"  # "paper", "balanced", or block positions such as "4,7"
    config.schedule = "auto"  # "bp", "minimal", "reference", "paper" or "3,1,0"
    config.shrink = 1.0  # beta: the cotangent's factor at each cut, in (0, 1]
    config.backward = "auto"  # weights it sees: "stored", "recompute" or "replay"
    config.accumulation = 0  # pieces of a batch, for one update; 0: the method's own
    config.engine = "auto"  # what runs the stages: "serial", "threads", "fused", "auto"

    # What else is done about gradients that are late: "none", or one of
    # "staleness_aware", "weight_prediction", "spike_compensation", "pipemare",
    # "nesterov_lookahead" (its authors have momentum = 0.99), "dc_asgd" and
    # "dc_asgd_adaptive"; fdg_jax.remedies has a paper for each.
    config.remedy = "none"
    # Lambda of "dc_asgd" (None: 0.04) or of "dc_asgd_adaptive" (None: 2.0).
    config.remedy_strength = config_dict.placeholder(float)
    # Until "pipemare" has the whole learning rate at every stage; 7 was chosen here.
    config.remedy_epochs = 7

    # For how long, and on how much at once.
    config.num_epochs = 300
    config.batch_size = 128  # images, for one update
    config.eval_batch_size = 500  # images
    config.seed = 0  # of parameters, data order, augmentation and dropout

    # The optimizer, the same at every stage.
    config.optimizer = "sgd"  # "sgd" or "adam" (with weight decay decoupled: AdamW)
    config.momentum = 0.9  # of "sgd"; 0: none
    config.weight_decay = 5e-4  # on every parameter
    config.learning_rate = 0.1
    config.learning_rate_milestones = (150, 225, 275)  # epochs at whose end it drops
    config.learning_rate_decay = 0.1  # its factor at each milestone
    config.warmup_epochs = 0  # epochs at the start with a lower learning rate
    config.warmup_factor = 0.1  # the learning rate's factor in those epochs

    # What is done about numbers that grow or shrink too much; each stage by itself.
    config.clip_norm = 0.0  # of a stage's gradient, at most; 0: not clipped
    config.skip_nonfinite = 0  # batches in a row that may be left out; 0: none
    config.loss_scale = 0.0  # in the backward; 0: 1024 for "float16", else 1

    # What is reported.
    config.log_every_steps = 50  # batches
    config.eval_every_epochs = 1  # epochs; the last epoch is always evaluated
    config.progress = True  # a progress bar, where standard error is a terminal
    config.timeline = False  # also timeline.json, with what every stage did when

    # A run that is stopped or killed goes on when it is started again with its workdir.
    config.restart = False  # True starts over, and removes what the workdir holds
    config.snapshot_every_minutes = 5.0  # 0: not by time
    config.snapshot_every_steps = 0  # batches; 0: not by number
    config.snapshots_kept = 2  # the newest ones
    config.stop_seconds = 9.0  # from SIGTERM or Ctrl-C to the exit, at most
    config.stall_timeout = (
        900.0  # seconds without a batch (or compiling) until it fails
    )

    # Compiled programs, kept for the next run: "auto" is JAX_COMPILATION_CACHE_DIR, or
    # else fdg_jax in the user's cache folder (on Linux ~/.cache); "off", or a folder.
    config.compilation_cache = "auto"

    return config
