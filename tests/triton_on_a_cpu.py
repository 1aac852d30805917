"""Triton's kernels where there is no GPU: run by its interpreter, seen by dynamo, compiled for a card that is not there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

HOPPER = 90
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has kernels that are launched run in Triton's interpreter, on tensors of the CPU; inside `torch.compile` too.

    Returns:
        The names of those that were launched, to be filled.
    """
    pytest.importorskip("triton")
    import torch.utils._triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        options = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
        InterpretedFunction(kernel.fn)[grid](*args, **options)

    def call(function: Any, *args: Any, **options: Any) -> Any:  # what a kernel calls, such as tl.sum
        scope = interpreter._patch_lang(
            function.fn
        )  # InterpretedFunction would leave it so, which the compiler does not survive
        try:
            return InterpretedFunction(function.fn).rewrite()(*args, **options)
        finally:
            scope.restore()

    class Hopper:
        """What dynamo asks of a driver to find out which tensors a kernel writes."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", HOPPER, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(JITFunction, "__call__", call)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(driver, "_active", Hopper())
    return launched


def compiled(
    kernel: Any,
    types: dict[str, torch.dtype],
    constants: dict[str, Any],
    num_warps: int,
    folder: Path,
    floats: Collection[str] = (),
) -> dict[str, int]:
    """Compiles a kernel to machine code of an H100.

    Args:
        types: of the tensors it points to, by argument; `floats` are float32, `eps` otherwise float64, as inductor
            passes numbers, all else int32. What Triton would find out at a launch with
            sizes like 1152 is taken for granted: that pointers and strides are multiples of 16.
        constants: its constexpr arguments.
    Returns:
        `registers` a thread, `spilled` bytes; the code itself is `kernel.ptx` in the folder.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS[types[name]]
        if name in types
        else "fp32"
        if name in floats
        else "fp64"
        if name == "eps"
        else "i32"
        for name in names
    }
    aligned = [
        name for name in names if signature[name] not in ("constexpr", "fp32", "fp64") and name not in ("chunks", "L")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options={"num_warps": num_warps})
    (folder / "kernel.ptx").write_text(built.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [str(ptxas), "-v", f"-arch=sm_{HOPPER}a", "kernel.ptx", "-o", os.devnull]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    words = said.replace(",", " ").split()
    return {
        "registers": int(words[words.index("registers") - 1]),
        "spilled": int(words[words.index("spill") - 2]),
    }


def one_graph(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled whole, forward and backward, by all of torch's compiler but the last step: a graph break is an error."""
    torch._dynamo.reset()
    return torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=False)
