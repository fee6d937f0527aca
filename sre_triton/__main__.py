"""``python -m sre_triton``: what a report of a fault needs."""

import argparse
import os
import platform
import shutil
import subprocess

import torch

import sre_triton

from .backend import choose, why_not_triton
from .compiled import waiting
from .internals import cpp_compiler

VARIABLES = (waiting.VARIABLE, "CXX", "TORCHINDUCTOR_CACHE_DIR", "TORCH_COMPILE_DISABLE", "TRITON_INTERPRET")
NO_COMPILER = "none was found: on a CPU the loss runs uncompiled"


def _version_of(compiler: str | None) -> str:
    """The first line of what the compiler says of itself."""
    if compiler is None or shutil.which(compiler) is None:
        return NO_COMPILER
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return (said.stdout or said.stderr).partition("\n")[0]


def _devices() -> list[torch.device]:
    """The CPU, and every GPU that PyTorch sees."""
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]


def main() -> None:
    """Print versions, the compiler, and who computes on every device, and why."""
    argparse.ArgumentParser("python -m sre_triton", description=main.__doc__).parse_args()
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    print(f"sre_triton  {sre_triton.__version__}")
    print(f"torch       {torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})")
    print(f"triton      {triton}")
    print(f"python      {platform.python_version()}, {platform.platform()}")
    compiler = _version_of(cpp_compiler())
    print(f"compiler    {compiler}")
    print(f"compiles    {waiting.WHEN}")
    print(f"variables   {' '.join(f'{name}={os.environ[name]}' for name in VARIABLES if name in os.environ) or 'none'}")
    print(f"threads     {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")
    for device in _devices():
        name = "" if device.type == "cpu" else f" ({torch.get_device_module(device).get_device_name(device)})"
        backend = choose(None, torch.empty(1, 2, device=device), False)
        reason = why_not_triton(device) or "Triton's interpreter is for tests: backend='triton' asks for it"
        uncompiled = ", uncompiled" if device.type == "cpu" and compiler == NO_COMPILER else ""
        print(f"{device}{name}: backend={backend!r}" + (f"{uncompiled}, as {reason}" if backend != "triton" else ""))


if __name__ == "__main__":
    main()
