"""`diffpolicy export`: a trained policy as a file that runs without this library."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffpolicy.cli.evaluate import load_policy
from diffpolicy.control.compiled.export import LIMIT
from diffpolicy.control.compiled.export import export as export_policy
from diffpolicy.control.compiled.formats import FORMATS


@dataclass(frozen=True)
class ExportArgs:
    """Write a policy as one file (and what it takes and gives beside it), checked against the policy."""

    run: tyro.conf.Positional[Path]
    """Run folder, or any folder with a saved policy."""
    format: Literal["onnx", "openvino", "torch_export", "aoti"] = "onnx"
    """Kind of file; onnx and openvino need no torch to run."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Name of the file; in RUN/export if not given."""
    batch_size: int = 1
    """Histories a run of the file takes, always."""
    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m"] | None = None
    """Instead of the policy's own."""
    steps: int | None = None
    """Sampler steps, instead of the policy's own."""
    device: str = "cpu"
    """Where torch_export and aoti are to run: cpu or cuda."""


def export(argv: Sequence[str]) -> None:
    """Run `diffpolicy export`."""
    args = tyro.cli(ExportArgs, args=argv, prog="diffpolicy export")
    policy = load_policy(args.run, args.device, args.sampler, args.steps)
    out = args.out or args.run / "export" / f"policy{FORMATS[args.format].suffix}"
    written = export_policy(policy, out, args.format, args.batch_size)
    print(f"  file         {written.path}\n  description  {written.description}")
    print(f"  parity       {written.difference:.1e} of the action range at most, limit {LIMIT:.0e}")
