"""Program of a submitted job's first process: it runs the call that submitit has stored.

Unlike submitit's own program it ends with status 1 when the launch failed, so that Slurm knows.

Process: the job's first.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(folder: str) -> int:
    """Run the stored call of this job; return its exit status."""
    from submitit.core.submission import process_job

    from traceml.launch.launcher.submission.allocation_call import last_outcome

    process_job(folder)
    outcome = last_outcome()
    if outcome is None or outcome.error is None:
        return 0

    notes = getattr(outcome.error, "__notes__", ())
    text = "\n".join([f"traceml: {type(outcome.error).__name__}: {outcome.error}", *notes])
    print(text, file=sys.stderr)  # noqa: T201 - this module is a program
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
