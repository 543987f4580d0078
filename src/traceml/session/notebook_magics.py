"""`%load_ext traceml`: the cell magic `%%traceml` traces one cell, and draws its run below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.lifecycle import note_exit, shutdown

if TYPE_CHECKING:
    from traceml.session.init_arguments import InitArguments

__all__ = ["register"]


def register(shell: Any) -> None:
    """Register the magic with IPython's shell."""

    def traceml(line: str, cell: str) -> None:
        """Trace a cell as a run of its own, named `%%traceml NAME`, and draw it; an existing recorder is used."""
        recorder = current_recorder()
        if recorder is not None and recorder.tracing and recorder.enabled and not recorder.is_deferred:
            _run(shell, cell)
            recorder.show()
        else:
            _trace_cell(shell, line.strip(), cell)

    shell.register_magic_function(traceml, "cell")


def _trace_cell(shell: Any, name: str, cell: str) -> None:
    from traceml.display.notebook import load_run
    from traceml.recorder.exits import status_of
    from traceml.recorder.run_notices import await_report
    from traceml.session.startup import init

    arguments: InitArguments = {"local": True, "quiet": True}
    if name:
        arguments["run_name"] = name

    recorder = init(**arguments)
    try:
        result = _run(shell, cell)  # shows the cell's exception itself
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            note_exit(error, status_of(error))
    finally:
        shutdown()

    if recorder.run_dir is not None:
        await_report(recorder.run_dir)
        load_run(recorder.run_dir).show()


def _run(shell: Any, cell: str) -> Any:
    """Run the cell below the magic by the cell's own number, by which its lines are named."""
    shell.execution_count -= 1  # the shell counts before it calls the magic
    try:
        return shell.run_cell(cell)
    finally:
        shell.execution_count += 1
