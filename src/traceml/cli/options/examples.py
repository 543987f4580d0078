"""Examples in the help of commands, at most 58 columns wide; a test runs each."""

from __future__ import annotations

__all__ = ["EXAMPLES", "examples_text"]

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "demo": (
        ("one of two ranks is slow in forward", "traceml demo"),
        ("all ranks wait for data", "traceml demo --fault input --ms 30"),
    ),
    "run": (
        ("one process", "traceml run train.py --lr 0.1"),
        ("four ranks, as torchrun would start them", "traceml run --nproc-per-node 4 train.py"),
        ("a module", "traceml run -m my_package.train"),
        ("with a page in the browser", "traceml run --live web train.py"),
    ),
    "launch": (
        ("as many ranks on each of two hosts as it has GPUs", "traceml launch --hostnames a b train.py"),
        ("a module", "traceml launch --hostnames a,b -m my_package.train"),
        ("the nodes of a Slurm allocation, through srun", "salloc -N2 traceml launch train.py"),
        ("as a job of Slurm, queued again when it is ended", "traceml launch --submit --nodes 2 train.py"),
    ),
    "serve": (
        ("for scripts with traceml.init() on this host", "traceml serve"),
        ("with a page of all runs", "traceml serve --web"),
        ("for other hosts, with metrics for Prometheus", "traceml serve --host 0.0.0.0 --prometheus"),
    ),
    "top": (("the newest running job", "traceml top"), ("another one", "traceml top a1b2")),
    "stacks": (
        ("the newest running job", "traceml stacks"),
        ("for a program", "traceml stacks a1b2 --json"),
    ),
    "profile": (
        ("the next five steps of the newest job", "traceml profile"),
        ("two ranks, for Perfetto", "traceml profile a1b2 --ranks 0,3 -o job.json.gz"),
        ("the sampled lines of a run, as a page", "traceml profile a1b2 --cpu -o lines.html"),
    ),
    "report": (
        ("the verdict of the latest run", "traceml report"),
        ("one file with charts", "traceml report a1b2 --html report.html"),
        ("fail a CI job", "traceml report --fail-on RANK_LOST INPUT_BOUND"),
        ("a flame graph", "traceml report --lines --format speedscope > lines.json"),
    ),
    "compare": (
        ("from run A to run B", "traceml compare a1b2 c3d4"),
        ("fail a CI job if B is 5 % slower", "traceml compare a1b2 c3d4 --fail-over 5"),
    ),
    "fleet": (
        ("all runs of the folder", "traceml fleet --update"),
        ("a run, next to those of its project", "traceml fleet a1b2 --update --where project=default"),
    ),
    "export": (
        ("for https://ui.perfetto.dev", "traceml export --format perfetto"),
        ("tables for pandas or DuckDB", "traceml export a1b2 --format parquet -o tables"),
        ("for dftracer's tools", "traceml export a1b2 -o run.pfw.gz"),
    ),
    "analyze": (
        ("an overview", "traceml analyze trace.pfw.gz"),
        ("the five longest kinds of I/O", "traceml analyze trace.pfw.gz --where cat=POSIX --top 5"),
        ("a chart", "traceml analyze trace.pfw.gz --plot chart.html"),
        ("chosen columns", "traceml analyze trace.pfw.gz --agg count,sum,p99"),
    ),
    "whatif": (
        ("what stragglers cost", "traceml whatif ops.parquet --meta j.yaml"),
        ("by worker, as a picture", "traceml whatif ops.parquet --meta j.yaml --heatmap h.png"),
    ),
    "sync": (
        ("all that is not uploaded yet", "traceml sync"),
        ("a run, to a tracker that it did not use", "traceml sync a1b2 --backend jsonl"),
    ),
    "runs": (
        ("the newest first", "traceml runs"),
        ("runs that were found slow, by speed", "traceml runs --where severity=critical --sort samples/s"),
        ("label one", "traceml runs tag a1b2 baseline"),
        ("keep the newest hundred", "traceml runs --prune --keep 100"),
    ),
    "runs rm": (("without a question, as in a script", "traceml runs rm a1b2 c3d4 --yes"),),
    "runs tag": (
        ("add a tag", "traceml runs tag a1b2 baseline"),
        ("the tags of a run", "traceml runs tag a1b2"),
    ),
    "runs note": (("what was tried", "traceml runs note a1b2 'with the new loader'"),),
    "runs rename": (("shown instead of the script's name", "traceml runs rename a1b2 'large batch'"),),
    "runs archive": (
        ("out of lists", "traceml runs archive a1b2 c3d4"),
        ("in lists again", "traceml runs archive a1b2 --undo"),
    ),
    "schema": (
        ("the documents that have one", "traceml schema"),
        ("of the report", "traceml schema report"),
    ),
    "mcp": (("in the configuration of an assistant", "traceml mcp --runs-dir /data/traceml_runs"),),
    "doctor": (
        ("check this installation", "traceml doctor"),
        ("only the settings, each with its source", "traceml doctor --settings"),
        ("whether jobs can be launched there", "traceml doctor --hostnames a b"),
    ),
    "completion": (
        ("bash, in ~/.bashrc", 'eval "$(traceml completion bash)"'),
        ("zsh, into a folder of $fpath", "traceml completion zsh > _traceml"),
        ("fish", "traceml completion fish > traceml.fish"),
    ),
}


def examples_text(command: str) -> str:
    """Return the examples of a command as a section of its help; "" if it has none.

    Args:
        command: `traceml report`, or without its first word.
    """
    examples = EXAMPLES.get(command.removeprefix("traceml "), ())
    lines = [line for purpose, words in examples for line in (f"  # {purpose}", f"  {words}")]
    return "\n".join(["examples:", *lines]) if lines else ""
