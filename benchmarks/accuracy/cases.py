"""Cases of `judge.py`: a script, its arguments, and what is true of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CASES", "QUIET", "Case"]

QUIET = frozenset({"HEALTHY", "COMPUTE_BOUND", "CPU_CONTENTION", "AFTER_STEPS"})
"""Verdicts of runs whose steps have no fault; they may have too few cores, and end with other code."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A real run and what its report must and must not say.

    Attributes:
        name: short, unique.
        script: file in `benchmarks/accuracy/shapes`.
        args: its arguments.
        ranks: number of processes.
        kinds: verdicts that are true; with a kind of `QUIET`, no finding may be a warning.
        blamed: ranks of the verdict.
        phase: phase of the verdict; None: any.
        function: function that the verdict's evidence names; None: any or none.
        steps: steps of each rank; None: any.
        since_step: step at which a slow-down began, within a tenth.
        also: kinds that must be among the findings.
        never: kinds that must not be among the findings.
        unsaid: texts that would be false in the advice of any finding.
        beside: whether another program takes a core meanwhile.
        fails: whether the script fails.
        cause: cause of a hang; None: any or none.
        needs: module that the script imports; without it the case is left out.
        hang_timeout_s: `hang_timeout` of a job that is ended when it hangs; None: the usual one, and it is not ended.
    """

    name: str
    script: str
    args: tuple[str, ...] = ()
    ranks: int = 1
    kinds: frozenset[str] = QUIET
    blamed: tuple[int, ...] = ()
    phase: str | None = None
    function: str | None = None
    steps: int | None = None
    since_step: int | None = None
    also: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    unsaid: tuple[str, ...] = ()
    beside: bool = False
    fails: bool = False
    cause: str | None = None
    needs: str = "torch"
    hang_timeout_s: float | None = None


def _case(name: str, command: str, *kinds: str, **facts: object) -> Case:
    script, *args = command.split()
    case = Case(name=name, script=f"{script}.py", args=tuple(args))
    return replace(case, **({"kinds": frozenset(kinds)} if kinds else {}), **facts)  # type: ignore[arg-type]


def _ddp(fault: str, *kinds: str, ranks: int = 2, more: str = "", **facts: object) -> Case:
    usual = " ".join(filter(None, [f"ddp {fault} x{ranks}", more.replace("--", "")]))
    epochs = 2 * 80 // (4 if "--accumulate 4" in more else 1)
    return replace(
        _case(usual, f"ddp --fault {fault} {more}", *kinds, ranks=ranks),
        **{"steps": epochs, "unsaid": ("is not the cause",), **facts},  # type: ignore[arg-type]
    )


def _loop(name: str, *kinds: str, **facts: object) -> Case:
    return _case(name.replace("_", " "), f"loops {name}", *kinds, **facts)


def _habit(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"habit, {name.replace('_', ' ')}", f"habits {name}", *kinds, **facts)


def _tutorial(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"tutorial, {name.replace('_', ' ')}", f"tutorials {name}", *kinds, **facts)


def _paper(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"paper, {name.replace('_', ' ')}", f"papers {name}", *kinds, **facts)


def _study(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"study, {name.replace('_', ' ')}", f"studies {name}", *kinds, **facts)


def _mixture(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"mixture, {name.replace('_', ' ')}", f"mixtures {name}", *kinds, **facts)


def _game(name: str, *kinds: str, **facts: object) -> Case:
    return _case(f"tutorial, {name.replace('_', ' ')}", f"games {name}", *kinds, **facts)


def _installed(name: str, needs: str, *kinds: str, **facts: object) -> Case:
    return _case(f"installed, {name.replace('_', ' ')}", f"installed {name}", *kinds, needs=needs, **facts)


_STRAGGLERS = frozenset({"STRAGGLER", "INPUT_STRAGGLER", "COMPUTE_STRAGGLER", "H2D_STRAGGLER"})
_LOUD = frozenset({"JITTER", "RESIDUAL_HEAVY", "INPUT_BOUND"})

_CLASSIFIER = (
    _case("classifier", "classifier", steps=180),
    _case("classifier, workers that start in each epoch", "classifier --workers 2 --batches 30", "INPUT_BOUND",
          phase="input_wait", steps=90),
    _case("classifier beside a program", "classifier", steps=180, beside=True),
    _case("metrics in Python", "classifier --fault metrics --epochs 2", "RESIDUAL_HEAVY", phase="other",
          function="update_metrics", steps=120),
    _case("metrics in Python, workers", "classifier --fault metrics --epochs 2 --workers 1", "RESIDUAL_HEAVY",
          phase="other", function="update_metrics", steps=120),
    _case("dataset decodes", "classifier --fault decode --epochs 2", "INPUT_BOUND", phase="input_wait",
          function="decode", steps=120),
    _case("dataset reads", "classifier --fault read --epochs 2", "INPUT_BOUND", phase="input_wait", function="read",
          steps=120),
    _case("dataset decodes, one worker", "classifier --fault decode --epochs 2 --workers 1", "INPUT_BOUND",
          phase="input_wait", steps=120),
    _case("forward copies to numpy", "classifier --fault forward --epochs 2", steps=120),
    # With fewer steps the growth costs a millisecond in the mean, from which on it is reported.
    _case("history grows", "classifier --fault history --epochs 25 --batches 80", "SLOWDOWN", function="smooth_history",
          steps=2000),
    _case("logs every 25th step", "classifier --fault periodic --epochs 4", "RESIDUAL_HEAVY",
          function="log_images", steps=240, never=frozenset({"JITTER"})),
    _case("collects garbage", "classifier --fault gc --epochs 2", "GC_PAUSES", function="train", steps=120),
    _case("saves often", "classifier --fault save --epochs 2", "CHECKPOINT_STALLS", steps=120),
    _case("start-up of 8 s", "classifier --fault startup", steps=180, also=frozenset({"STARTUP"})),
    _case("evaluates long", "classifier --fault evaluation", "EVAL_HEAVY", steps=180),
)  # fmt: skip

_GPT = (
    _case("gpt", "gpt", steps=150),
    _case("gpt, accumulation of 4", "gpt --accumulate 4 --steps 60", steps=60),
    _case("gpt, compiled", "gpt --compile", steps=150),
    _case("gpt beside a program", "gpt", steps=150, beside=True),
    _case("gpt evaluates often", "gpt --evaluate-every 10 --evaluate-batches 70 --steps 100", "EVAL_HEAVY", steps=100,
          never=frozenset({"JITTER", "INPUT_BOUND"})),
    _case("gpt tokenizes", "gpt --fault tokenize --steps 300", "RESIDUAL_HEAVY", "INPUT_BOUND", function="tokenize",
          steps=300),
    _case("gpt waits", "gpt --fault sync --steps 120", "RESIDUAL_HEAVY", phase="other", steps=120),
)  # fmt: skip

_DDP = (
    _ddp("none"),
    # Gloo's ring has 4 and 6 turns with 3 and 4 ranks, which share the cores: on two slow cores they take 9 of 11 ms,
    # and steps that do not synchronize take 1.2 ms.
    *(_ddp("none", *QUIET, "COMM_BOUND", ranks=ranks, never=_STRAGGLERS) for ranks in (3, 4)),
    # Without no_sync() gradients are reduced four times a step, which three of them do not need.
    _ddp("none", *QUIET, "COMM_BOUND", more="--accumulate 4", never=_STRAGGLERS),
    _ddp("none", name="ddp none x2 beside a program", beside=True, never=_STRAGGLERS),
    *(_ddp("input", "INPUT_STRAGGLER", ranks=ranks, blamed=(1,), phase="input_wait", function="stall")
      for ranks in (2, 3, 4)),
    *(_ddp("forward", "COMPUTE_STRAGGLER", ranks=ranks, blamed=(1,), phase="forward", function="stall")
      for ranks in (2, 3, 4)),
    *(_ddp("backward", "COMPUTE_STRAGGLER", ranks=ranks, blamed=(1,), phase="backward") for ranks in (2, 4)),
    *(_ddp("optimizer", "COMPUTE_STRAGGLER", ranks=ranks, blamed=(1,), phase="optimizer") for ranks in (2, 4)),
    *(_ddp("other", "STRAGGLER", ranks=ranks, blamed=(1,), phase="other", function="stall") for ranks in (2, 3, 4)),
    _ddp("other", "STRAGGLER", more="--slow-rank 0", blamed=(0,), phase="other", function="stall"),
    _ddp("forward", "COMPUTE_STRAGGLER", more="--ms 5", blamed=(1,), phase="forward"),
    _ddp("other", "STRAGGLER", more="--ms 40 --accumulate 4", blamed=(1,), phase="other"),
    _ddp("everywhere", "RESIDUAL_HEAVY", phase="other", function="stall", never=_STRAGGLERS),
    _ddp("dataset", "INPUT_BOUND", more="--ms 40", phase="input_wait", function="Rows.__getitem__", never=_STRAGGLERS),
    _ddp("turns", "STRAGGLER", "RESIDUAL_HEAVY", more="--ms 30", phase="other"),
    # Gloo's threads need cores too: on two cores the ranks may lack them more than they wait for each other.
    _ddp("none", "COMM_BOUND", "CPU_CONTENTION", more="--width 3000 --batches 40", steps=80, never=_STRAGGLERS),
    _ddp("killed", "RANK_LOST", blamed=(1,), steps=None, fails=True),
    _ddp("raises", "RANK_LOST", blamed=(1,), steps=None, fails=True),
)  # fmt: skip


def _death(how: str, *, cause: str | None = None, function: str | None = None) -> Case:
    return _case(f"death, {how.replace('_', ' ')} x2", f"deaths {how}", "RANK_LOST", ranks=2, blamed=(1,), cause=cause,
                 function=function, fails=True, unsaid=("cache its result",))  # fmt: skip


_DEATHS = (
    _death("allocation", cause="out_of_memory", function="allocate"),
    _death("segfault", function="crash"),
    _death("raise", function="fail"),
    _death("raise_again", function="fail"),
    _death("worker", function="decode"),
    _death("exit"),
    _death("os_exit", function="stop"),
    _case("death, terminated x2", "deaths terminated", "RANK_LOST", ranks=2, cause="ended_from_outside", fails=True),
)

_FILES = (
    _case("photos", "files", "INPUT_BOUND", phase="input_wait", function="Photos.__getitem__", steps=60),
    _case("photos, one worker", "files --workers 1", "INPUT_BOUND", phase="input_wait",
          function="Photos.__getitem__", steps=60),
    _case("photos, workers restart each epoch", "files --workers 1 --epochs 3", "INPUT_BOUND", phase="input_wait",
          steps=180),
)  # fmt: skip

_LOOPS = (
    _loop("gan", steps=200),
    _loop("folds", steps=360),
    _loop("distill", steps=200, never=_LOUD),
    _loop("one_batch", steps=200),
    _loop("ppo", "RESIDUAL_HEAVY", steps=192, never=frozenset({"JITTER"}), unsaid=("every 32nd step",)),
    _loop("lbfgs", steps=60, unsaid=("fused=True",)),
    _loop("own_update", steps=200),
    _loop("new_optimizer_each_step", steps=200),
    _loop("autograd_grad", steps=200),
    _loop("generator_data", steps=200),
    _loop("slow_generator", "INPUT_BOUND", function="read_shard", steps=200),
    _loop("slow_iterator", "INPUT_BOUND", function="read_shard", steps=200),
    _loop("own_optimizer", steps=200, unsaid=("fused=True",)),
    _loop("clips", steps=200),
    _loop("evaluates_in_the_loop", "EVAL_HEAVY", steps=200, never=_LOUD),
    _loop("stream", steps=200),
    _loop("amp", steps=200),
    _loop("scaler_skips", "STEPS_SKIPPED", steps=200, phase="optimizer", never=frozenset({"NUMERIC"})),
    _loop("scaler_skips_gradients", "STEPS_SKIPPED", steps=200, phase="optimizer", never=frozenset({"NUMERIC"})),
    _loop("not_finite", "NUMERIC", steps=200, since_step=120, never=frozenset({"STEPS_SKIPPED"})),
    _loop("ema", *QUIET, "RESIDUAL_HEAVY", steps=200),  # the average of the weights, 1 ms on a slow machine
    _loop("siamese", steps=200),
    _loop("autoencoder", steps=200),
    # Making the data and packing it takes a tenth of a step, at times more.
    _loop("recurrent", *QUIET, "RESIDUAL_HEAVY", steps=150, never=frozenset({"JITTER"})),
    _loop("slower_with_time", "SLOWDOWN", function="replay", steps=300),
    _loop("jump", "SLOWDOWN", function="check_gradients", steps=300, since_step=150),
)

_HABITS = (
    _habit("iterator_in_each_step", "INPUT_BOUND", phase="input_wait", function="iterator_in_each_step", steps=100),
    _habit("slow_sampler", "INPUT_BOUND", phase="input_wait", function="Balanced.draw", steps=200),
    _habit(
        "slow_sampler_without_workers",
        "INPUT_BOUND",
        phase="input_wait",
        function="Balanced.draw",
        steps=200,
        unsaid=("num_workers=",),
    ),
    _habit("few_shards", "INPUT_BOUND", phase="input_wait", steps=600, unsaid=("num_workers=",)),
    _habit(
        "shared_lock",
        "INPUT_BOUND",
        phase="input_wait",
        function="Locked.__getitem__",
        steps=300,
        unsaid=("num_workers=",),
    ),
    _habit("lists_of_numbers", "INPUT_BOUND", phase="input_wait", steps=300, unsaid=("num_workers=",)),
    _habit("mixup_in_collate", "INPUT_BOUND", phase="input_wait", function="blend", steps=200),
    _habit("prefetch_thread", "INPUT_BOUND", phase="input_wait", function="prefetch_thread", steps=150),
    _habit("prefetch_thread_that_keeps_up", steps=150),
    _habit("two_loaders", "INPUT_BOUND", phase="input_wait", function="Recordings.download", steps=200),
    _habit("http_stream", "INPUT_BOUND", phase="input_wait", function="Served.download", steps=120),
    _habit("prints_each_step", steps=200),
    _habit("progress_bar", steps=400),
    _habit("plots_each_step", "RESIDUAL_HEAVY", phase="other", function="plots_each_step.<locals>.plot", steps=60),
    _habit(
        "prepares_a_table", "RESIDUAL_HEAVY", "INPUT_BOUND", function="prepares_a_table.<locals>.features", steps=150
    ),
    _habit("saves_each_10th_step", "CHECKPOINT_STALLS", phase="checkpoint", steps=200, never=_LOUD),
    _habit(
        "rewrites_its_log", "RESIDUAL_HEAVY", phase="other", function="rewrites_its_log.<locals>.rewrite", steps=600
    ),
    _habit(
        "registers_a_hook_in_each_step",
        "SLOWDOWN",
        phase="forward",
        function="registers_a_hook_in_each_step.<locals>.watch",
        steps=1500,
    ),
    _habit("makes_a_mask_in_each_forward", steps=200, unsaid=("Nothing needs fixing",)),
    _habit("evaluates_a_loader_each_50_steps", *QUIET, "EVAL_HEAVY", steps=200, never=_LOUD),
    _habit("validates_with_gradients", *QUIET, "EVAL_HEAVY", steps=300, never=_LOUD),
    _habit("calls_for_each_sample", *QUIET, "RESIDUAL_HEAVY", steps=200, unsaid=("torch.compile",)),
    _habit("keeps_the_best"),
    _habit("multi_task", steps=100),
    _habit("sweep", steps=1200, never=_LOUD | {"SLOWDOWN"}),
    _habit("unfreezes", steps=400, never=_LOUD | {"SLOWDOWN"}),
    _habit("longer_sequences", steps=450, never=_LOUD | {"SLOWDOWN"}),
    _habit("anomaly_detection", steps=200),
    _habit("averages_weights", steps=600),
)

_TUTORIALS = (
    _tutorial("dcgan", steps=200),
    _tutorial("vae", steps=200),
    _tutorial("word_language_model", steps=120),
    _game("reinforce", "RESIDUAL_HEAVY", phase="other", function="Game.simulate", steps=60),
    _game("dqn", "RESIDUAL_HEAVY", phase="other", function="Game.simulate", steps=297),
    _game("cleanrl_ppo", "RESIDUAL_HEAVY", function="Game.simulate", steps=160, never=frozenset({"JITTER"})),
    _tutorial("style_transfer", *QUIET, "RESIDUAL_HEAVY", steps=60),  # the loss, in a closure
    _tutorial("deep_dream", steps=200),
    _tutorial("adversarial", steps=200),
    _tutorial("functional", steps=200),
    _tutorial("meta_learning", *QUIET, "RESIDUAL_HEAVY", steps=60),  # the inner updates
    # Sampling is evaluation, and takes about a quarter of the time after the start-up.
    _tutorial("diffusion", *QUIET, "RESIDUAL_HEAVY", "EVAL_HEAVY", steps=200, never=frozenset({"JITTER"})),
    _tutorial("sharpness", *QUIET, "RESIDUAL_HEAVY", steps=200),  # its first step, in the loop
    _tutorial("full_graph", *QUIET, "EVAL_HEAVY", steps=150, never=_LOUD),
)

_PAPERS = (
    _paper("wgan_gp", steps=200, never=_LOUD),
    _paper("soft_actor_critic", *QUIET, "RESIDUAL_HEAVY", steps=600, never=frozenset({"JITTER"})),
    # The crops take a seventh of a step, and what the loop does itself another one.
    _paper("momentum_contrast", *QUIET, "INPUT_BOUND", steps=75, never=frozenset({"JITTER"})),
    _paper(
        "memory_bank",
        *("SLOWDOWN", "RESIDUAL_HEAVY", "CPU_CONTENTION"),
        steps=300,
        never=frozenset({"JITTER"}),
        unsaid=("take it out of",),
    ),
    _paper("sparse_table", steps=400, never=_LOUD, unsaid=("fused=True",)),
    _paper("two_tower", steps=200, never=_LOUD),
    _paper("detection", *QUIET, "EVAL_HEAVY", "INPUT_BOUND", steps=180, never=frozenset({"JITTER", "RESIDUAL_HEAVY"})),
    _paper("growing_batches", *QUIET, "INPUT_BOUND", steps=400, never=frozenset({"RESIDUAL_HEAVY"})),
    # Gradients are clipped and summed by the script, in some lines.
    _paper("private_gradients", *QUIET, "RESIDUAL_HEAVY", steps=200, never=frozenset({"JITTER", "INPUT_BOUND"})),
    _paper("informed_by_physics", steps=315, never=_LOUD),
    _paper("checkpoints_activations", steps=60, never=_LOUD),
)

_STUDIES = (
    _study("low_rank", steps=120, never=_LOUD),
    _study("radiance_field", *QUIET, "EVAL_HEAVY", steps=150, never=frozenset({"INPUT_BOUND"})),
    _study("translation", *QUIET, "EVAL_HEAVY", steps=90, never=_LOUD),
    _study("early_stopping", *QUIET, "INPUT_BOUND", never=frozenset({"JITTER", "RESIDUAL_HEAVY"})),
    _study("active_learning", *QUIET, "EVAL_HEAVY", "INPUT_BOUND", steps=600, never=frozenset({"RESIDUAL_HEAVY"})),
    _study("skip_gram", steps=400, never=frozenset({"INPUT_BOUND", "JITTER"})),
    _study("neural_ode", steps=40, never=_LOUD),
)

_MIXTURES = (
    _mixture("loader_per_epoch", "INPUT_BOUND", phase="input_wait", steps=160, never=frozenset({"JITTER"})),
    _mixture("adam_and_lbfgs", steps=220, never=_LOUD),
    _mixture("awaits_batches", "RESIDUAL_HEAVY", phase="other", function="awaits_batches.<locals>.both", steps=150),
    _mixture("pseudo_labels", *QUIET, "EVAL_HEAVY", "INPUT_BOUND", steps=240, never=frozenset({"JITTER", "SLOWDOWN"})),
    _mixture("pseudo_labels_wait", "INPUT_BOUND", phase="input_wait", steps=160),
    # Updating the averages is a seventh of its step, outside the known phases.
    _mixture("evaluates_averages", *QUIET, "EVAL_HEAVY", "RESIDUAL_HEAVY", steps=240, never=_LOUD - {"RESIDUAL_HEAVY"}),
    _mixture(
        "trials",
        "RESIDUAL_HEAVY",
        phase="other",
        function="load",
        steps=240,
        unsaid=("every 80th",),
        never=frozenset({"JITTER", "EVAL_HEAVY"}),
    ),
    _mixture("plots_at_the_end", steps=200, never=_LOUD | {"EVAL_HEAVY"}),
)

_INSTALLED = (
    _installed("geometric", "torch_geometric", *QUIET, "INPUT_BOUND", steps=120),
    _installed("sb3_ppo", "stable_baselines3", "RESIDUAL_HEAVY", steps=160, never=frozenset({"JITTER"})),
    _installed("sb3_dqn", "stable_baselines3", "RESIDUAL_HEAVY", function="_game.<locals>.Game.simulate"),
    _installed("hf_language_model", "transformers", *QUIET, "EVAL_HEAVY", "CHECKPOINT_STALLS", steps=160),
    _installed("lightning_gan", "pytorch_lightning", *QUIET, "RESIDUAL_HEAVY", steps=200),
    _installed("accelerate_accumulates", "accelerate", steps=100),
    # The tokenizer's threads compute while the training thread waits for them.
    _installed(
        "tokenizer",
        "tokenizers",
        "INPUT_BOUND",
        phase="input_wait",
        function="collate",
        steps=100,
        unsaid=("of its time waiting",),
    ),
    _installed("web_dataset", "webdataset", *QUIET, "INPUT_BOUND", steps=200),
)

_FRAMEWORKS = (
    _case("Hugging Face", "frameworks hf", steps=120),
    _case("Lightning", "frameworks lightning", steps=120),
    _case("Accelerate", "frameworks accelerate", steps=120),
    _case("Hugging Face, slow data", "frameworks hf input", "INPUT_BOUND", phase="input_wait", function="augment",
          steps=120),
    _case("Lightning, slow data", "frameworks lightning input", "INPUT_BOUND", phase="input_wait", function="augment",
          steps=120),
    _case("Accelerate, slow data", "frameworks accelerate input", "INPUT_BOUND", phase="input_wait", function="augment",
          steps=120),
)  # fmt: skip

_ENGINES = (
    _case("references of torchvision", "engines references", steps=360),
    # Averaging the weights and mixing the samples are a tenth of a step.
    _case("prefetcher and scaler of timm", "engines prefetcher", *QUIET, "RESIDUAL_HEAVY", steps=200),
    # The loader makes one graph of 32 in the training process, which is a seventh of a step.
    _case("graphs", "engines graphs", *QUIET, "INPUT_BOUND", steps=200),
    _case("graphs, plotted in each step", "engines graphs_plotted", "RESIDUAL_HEAVY", phase="other",
          function="plot_embedding", steps=200),
    _case("Learner of fastai", "engines learner", steps=400),
    _case("Learner of fastai, slow transforms", "engines learner_transforms", "INPUT_BOUND", phase="input_wait",
          function="rotate_and_crop", steps=400),
)  # fmt: skip

_SHARDED = (
    _case("FSDP2 x2", "sharded fsdp", *QUIET, "COMM_BOUND", ranks=2, steps=120, never=_STRAGGLERS),
    _case("tensor parallel x2", "sharded tensor_parallel", *QUIET, "COMM_BOUND", ranks=2,
          steps=200, never=_STRAGGLERS | {"RESIDUAL_HEAVY"}),
    _case("two stages x2", "sharded two_stages", "COMPUTE_STRAGGLER", ranks=2, blamed=(1,), steps=300,
          never={"DATA_IMBALANCE"}, unsaid=("as much data per step",)),
    _case("local SGD x2", "sharded local_sgd", "COMM_BOUND", ranks=2, phase="comm", function="average", steps=400),
    _case("spawned by the script", "sharded spawned", *QUIET, "COMM_BOUND", steps=150, never=_STRAGGLERS),
)  # fmt: skip


def _hang(how: str, *blamed: int, cause: str, function: str | None = None, ranks: int = 2) -> Case:
    usual = how.replace("_", " ").replace("--start-method", "by")
    return _case(f"hang, {usual} x{ranks}", f"hangs {how}", "HANG", ranks=ranks, blamed=blamed, cause=cause,
                 function=function, hang_timeout_s=10.0, fails=True)  # fmt: skip


def _no_hang(how: str) -> Case:
    return _case(f"no hang, {how} x2", f"hangs {how}", *QUIET, "JITTER", "EVAL_HEAVY", "STARTUP", "RESIDUAL_HEAVY",
                 "STRAGGLER", "COMM_BOUND", ranks=2, blamed=(), never=frozenset({"HANG", "RANK_LOST"}),
                 hang_timeout_s=10.0)  # fmt: skip


_HANGS = (
    _hang("sleep", 1, cause="never_came", function="sleep"),
    _hang("held", 1, cause="never_came", function="hold_interpreter"),
    _hang("file_lock", 1, cause="never_came", function="wait_for_file"),
    _hang("pipe", 1, cause="never_came", function="fill_pipe"),
    _hang("stopped", 1, cause="never_came"),
    _hang("worker", 1, cause="never_came", function="wait_for_lock"),
    _hang("barrier", 0, 1, cause="mismatch"),
    _hang("uneven", 1, cause="data_ended"),
    _hang("subgroup", 0, 1, cause="cycle"),
    _hang("skip", 0, 1, cause="mismatch"),
    _hang("sleep", 1, cause="never_came", function="sleep", ranks=4),
    _hang("file_lock", 1, cause="never_came", function="wait_for_file", ranks=3),
    _hang("pipe", 1, cause="never_came", function="fill_pipe", ranks=4),
    _hang("worker", 1, cause="never_came", function="wait_for_lock", ranks=3),
    _hang("subgroup", 0, 1, cause="cycle", ranks=4),
    _hang("worker --start-method spawn", 1, cause="never_came", function="wait_for_lock"),
    *(_hang("skip", 1, cause="mismatch", ranks=ranks) for ranks in (3, 4)),
    *(_hang("barrier", 0, cause="mismatch", ranks=ranks) for ranks in (3, 4)),
    *(_hang("uneven", 1, cause="data_ended", ranks=ranks) for ranks in (3, 4)),
    *(_hang("stopped", 1, cause="never_came", ranks=ranks) for ranks in (3, 4)),
    *(_hang("held", 1, cause="never_came", function="hold_interpreter", ranks=ranks) for ranks in (3, 4)),
    _case(
        "stopped for 12 s and continued x2",
        "hangs paused",
        "STOPPED",
        ranks=2,
        blamed=(1,),
        steps=80,
        never=frozenset({"HANG", "RANK_LOST", "JITTER"}),
    ),
    _no_hang("evaluate"),
    _no_hang("tokenize"),
)


def _wait(how: str, *, function: str | None = None, ranks: int = 1, cause: str = "stuck") -> Case:
    many = f" x{ranks}" if ranks > 1 else ""
    return _case(f"hang, {how.replace('_', ' ')}{many}", f"waits {how}", "HANG", ranks=ranks, blamed=(0,),
                 cause="never_came" if ranks > 1 else cause, function=function or how, hang_timeout_s=10.0,
                 fails=True)  # fmt: skip


def _long(how: str) -> Case:
    return _case(f"no hang, {how.replace('_', ' ')}", f"waits {how}", *QUIET, "JITTER", "EVAL_HEAVY", "RESIDUAL_HEAVY",
                 "STARTUP", steps=80, never=frozenset({"HANG", "RANK_LOST"}),
                 hang_timeout_s=10.0)  # fmt: skip


_WAITS = (
    *(_wait(how) for how in ("two_locks", "no_producer", "locked_database", "unread_child", "silent_server",
                             "full_backlog", "unjoined_queue", "pause_in_c", "thread_result", "spin")),
    *(_wait(how) for how in ("hold_interpreter", "fill_stderr", "item_locked")),
    _case("hang, stop itself", "waits stop_itself", "HANG", blamed=(0,), cause="stuck", hang_timeout_s=10.0,
          fails=True),
    *(_wait(how, ranks=2) for how in ("locked_file", "silent_peer", "long_child", "poll_file", "backtrack")),
    _wait("beside_signs_of_life", ranks=2),
    _wait("at_exit_waits", function="no_producer"),
    _wait("thread_at_exit", function="silent_peer"),
    _wait("item_in_c", ranks=2),
    _wait("item_from_server", function="silent_server"),
    *(_long(how) for how in ("evaluate_long", "save_long", "fetch_with_output", "fetch_slowly", "solve")),
)  # fmt: skip


def _meet(how: str, *blamed: int, cause: str, function: str | None = None, ranks: int = 2) -> Case:
    return _case(f"hang, {how.replace('_', ' ')} x{ranks}", f"collectives {how}", "HANG", ranks=ranks, blamed=blamed,
                 cause=cause, function=function, hang_timeout_s=10.0, fails=True)  # fmt: skip


_MEETINGS = (
    _meet("late", 1, cause="never_came", function="late"),
    _meet("index", 1, cause="never_came", function="poll"),
    _meet("send", 0, 1, cause="cycle", function="diverge"),
    _meet("receive", 0, 1, cause="cycle", function="diverge", ranks=3),
    _meet("half", 0, 1, cause="cycle", function="diverge", ranks=4),
    _meet("objects", 0, 1, cause="mismatch", function="diverge"),
    # Whether the others still wait when the look comes, or have lost their connection, is chance: rank 1 left.
    _case("leaves early x2", "collectives leaves", "HANG", "RANK_LOST", ranks=2, blamed=(1,), hang_timeout_s=10.0,
          fails=True),
    _case("leaves at once x2", "collectives leaves_at_once", "RANK_LOST", ranks=2, blamed=(1,), fails=True),
    _case("reduces other sizes x2", "collectives reduce_sizes", "RANK_LOST", ranks=2, function="diverge",
          blamed=(1,), fails=True),
    _case("no hang, rank 0 validates x2", "collectives validates", *QUIET, "JITTER", "EVAL_HEAVY", "STRAGGLER",
          "RESIDUAL_HEAVY", "COMM_BOUND", ranks=2, never=frozenset({"HANG", "RANK_LOST"}), hang_timeout_s=10.0),
)  # fmt: skip

_LEAK, _IMBALANCE = frozenset({"MEMORY_LEAK"}), frozenset({"MEMORY_IMBALANCE"})

_MEMORY = (
    _case("keeps losses", "memory losses", "MEMORY_LEAK", function="losses", steps=600),
    _case("sums losses", "memory running_sum", "MEMORY_LEAK", function="running_sum", steps=600),
    _case("keeps batches", "memory outputs", "MEMORY_LEAK", function="keep", steps=600),
    _case("a hook keeps activations", "memory hook", "MEMORY_LEAK", function="remember", steps=600),
    _case("caches without a bound", "memory cached", "MEMORY_LEAK", steps=600),
    _case("workers copy a list", "memory listing", "MEMORY_LEAK"),
    _case("evaluates with much memory", "memory evaluates", *QUIET, "RESIDUAL_HEAVY", steps=600, never=_LEAK),
    _case("fills a cache in the first epoch", "memory fills_a_cache", steps=600, never=_LEAK),
    _case("batches of all sizes", "memory batches_of_all_sizes", steps=600, never=_LEAK),
    _case("keeps numbers", "memory floats", steps=600, never=_LEAK),
    _case("rank 0 holds all data x2", "memory rank_0_holds_all", ranks=2, also=_IMBALANCE, never=_LEAK),
    _case("each rank holds its half x2", "memory each_rank_holds_half", ranks=2, never=_LEAK | _IMBALANCE),
)

_STALLS = (
    _case("a large heap, collected in each step", "stalls collects --steps 60", "GC_PAUSES", function="collect",
          steps=60),
    _case("a large heap, collected by the interpreter", "stalls remembers", "GC_PAUSES", steps=200),
    _case("makes and drops objects", "stalls drops", steps=200, never=frozenset({"GC_PAUSES"})),
    _case("compiles for each name", "stalls names", "RECOMPILES", function="forward", steps=200),
    _case("compiles for each size", "stalls sizes", "RECOMPILES", function="forward", steps=200),
    _case("compiles many layers", "stalls deep --steps 60", steps=60, also=frozenset({"STARTUP"}),
          never=frozenset({"RECOMPILES", "JITTER", "SLOWDOWN"})),
    _case("compiled for any size", "stalls sizes_dynamic", steps=200, never=frozenset({"RECOMPILES"})),
    _case("compiled, with smaller last batches", "stalls last_batch", steps=200,
          never=frozenset({"RECOMPILES", "JITTER"})),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *_CLASSIFIER,
    *_GPT,
    *_DDP,
    *_DEATHS,
    *_FILES,
    *_LOOPS,
    *_HABITS,
    *_TUTORIALS,
    *_PAPERS,
    *_STUDIES,
    *_MIXTURES,
    *_INSTALLED,
    *_FRAMEWORKS,
    *_ENGINES,
    *_SHARDED,
    *_HANGS,
    *_WAITS,
    *_MEETINGS,
    *_MEMORY,
    *_STALLS,
)
