"""`traceml mcp`: a Model Context Protocol server on standard input and output, for assistants."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from traceml.cli.assistants.run_tools import RunTools
from traceml.cli.options.parsing import Metavar, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.errors import TraceMLError
from traceml.version import __version__

__all__ = ["main"]

_INSTRUCTIONS = (
    "Find out why a PyTorch training is slow, hangs, or got slower. Start with findings (of the latest run), then "
    "explain_kind for a kind you do not know, report with sections=['lines'] for lines of code, compare for "
    "regressions, stacks for a job that runs or hangs. Numbers in an answer are measured; do not invent others."
)


@dataclass(frozen=True)
class McpOptions(RunsDirOptions):
    """Answer an assistant's questions about runs, as a server of the Model Context Protocol.

    It speaks on standard input and output; a client starts it.

    Tools: list_runs, report, findings, stacks, compare, analyze, explain_kind. Nothing is written.

    Add it to a client with the command: traceml mcp --runs-dir DIR
    """

    runs_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder of the runs; no others are read (default: the setting runs_dir)."""
    traces: Annotated[tuple[str, ...], Metavar("DIR")] = ()
    """Folders whose traces analyze may read, in addition to the runs folder."""


def main(argv: list[str]) -> int:
    """Serve until standard input ends."""
    options = parse(McpOptions, argv, prog="traceml mcp")
    config = options.config
    os.environ.setdefault("MCP_LOG_LEVEL", "WARNING")
    server = _build_server(RunTools(config.runs_dir, [Path(folder) for folder in options.traces]))
    server.run("stdio")
    return 0


def _build_server(tools: RunTools) -> Any:
    """Return a server of the `mcp` package with the tools.

    Raises:
        TraceMLError: the package is not installed.
    """
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp.types import ToolAnnotations
    except ImportError as error:
        raise TraceMLError("mcp needs the package mcp, version 2: pip install 'traceml-torch[mcp]'") from error

    known = {tool.__name__: list(inspect.signature(tool).parameters) for tool in tools.tools()}

    class StrictServer(MCPServer):  # type: ignore[misc]  # the package is optional
        """A server that refuses unknown arguments; the package leaves them out, and answers another question."""

        async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
            """Call a tool whose arguments all have a meaning."""
            for argument in arguments:
                if argument not in known.get(name, arguments):
                    raise ToolError(f"{name} has no argument {argument!r}; it has {', '.join(known[name])}")

            return await super().call_tool(name, arguments, context)

    server = StrictServer("traceml", instructions=_INSTRUCTIONS, version=__version__, log_level="WARNING")
    for tool in tools.tools():
        server.add_tool(_with_reasons(tool, ToolError), annotations=ToolAnnotations(read_only_hint=True))

    return server


def _with_reasons(tool: Callable[..., dict[str, Any]], tool_error: type[Exception]) -> Callable[..., dict[str, Any]]:
    """Return a tool whose errors reach the assistant with their text: others are withheld from it."""

    @functools.wraps(tool)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return tool(*args, **kwargs)
        except (TraceMLError, OSError) as error:
            raise tool_error(str(error)) from error

    return answer
