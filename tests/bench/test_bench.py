"""Benchmarks end to end, at a size that says nothing about speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.bench import gpu, host, show
from nexus_scale.bench.checkpoint import TARGETS, run
from nexus_scale.bench.gpu import measuring, profile
from nexus_scale.bench.gpu.cases import CASES
from nexus_scale.bench.gpu.planned import beside
from nexus_scale.contracts import SAFE_ENVIRONMENT, UserError
from nexus_scale.kernels import choice
from tests.distributed import forked, run_ranks


@pytest.mark.slow
def test_checkpoints_are_measured_beside_both_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of `nexus`, where DeepSpeed's own converter could not read its own files."""
    for name, value in SAFE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    result = run(rounds=1, mebibytes=12)
    assert result["settings"]["bytes"] >= 12 * 2**20
    figures = [*result["ours"].values(), *result["bare"].values(), *result["peers"]["dcp_async_save"].values()]
    assert min(*figures, *result["peers"]["deepspeed"].values(), *(result[name] for name in TARGETS)) > 0


def test_host_time_is_measured_of_sides_that_learn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank and two, every engine and every peer: their losses after the same steps agree, so the same work was timed."""
    context = forked()
    monkeypatch.setattr(host.multiprocessing, "get_context", lambda method: context)
    result = host.run(rounds=1, steps_per_round=1, size=host.Size(depth=1, width=16))
    assert set(result["two_ranks"]) == {*host.ZERO3, "replicated", "bare", "ddp", "fsdp2"}
    for ranks in ("one_rank", "two_ranks"):
        sides = result[ranks]
        assert min(side["cpu_ms"] for side in sides.values()) > 0
        expected = pytest.approx(sides["bare"]["loss"], rel=1e-4)
        assert {name: side["loss"] for name, side in sides.items()} == dict.fromkeys(sides, expected)
    assert result["ratio"] == result["ratios"]["zero3_over_local"]["zero3_block_by_block"]


ALIKE = {"dit_local", "dit_deterministic", "small_zero3", "small_local", "small_diffusers", "sd3_local"}
"""Cases that run what others run, on other sizes."""


def _every_case(rank: int, world_size: int) -> dict[str, list[dict[str, Any]]]:
    """All rows by case, in miniature on the CPU."""
    from nexus_scale.bench.gpu.worker import do

    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in CASES.items():
        if name in ALIKE:
            continue
        rows = found[name] = []
        do(case, torch.device("cpu"), tiny=True, compiled=False, emit=lambda rows=rows, **row: rows.append(row))
    return found


def test_every_case_of_bench_gpu_runs_in_miniature() -> None:
    """Without a GPU: so that its minutes on one are not spent on a misspelt name."""
    (found,) = run_ranks(1, _every_case)
    for name, rows in found.items():
        if CASES[name].task is None:
            assert any(row.get("ms", row.get("both_ms", 0)) > 0 for row in rows), rows
            continue
        if name == "dit_fp8":  # asked for by name, which a CPU refuses
            (row,) = rows
            assert "kernels.linear: 'fp8' is not available here" in row["unavailable"]
            continue
        if CASES[name].kind == "draws":
            (row,) = rows
            assert row["ms"] > 0 and row["steps"] > 2
            continue
        built, step, spent = rows
        if CASES[name].kind == "ours":
            assert set(step["stages"]) == {"data", "forward", "backward", "step"}
            assert sum(step["stages"].values()) == pytest.approx(step["ms"], rel=0.5)
        assert built["flops"] > 0 and step["samples_per_second"] > 0 and step["tflops"] > 0
        assert sum(spent["shares"].values()) == pytest.approx(1) and spent["device_ms"] > 0
        assert spent["shares"]["matmul"] > 0 and len(spent["longest"]) == 20
    assert {row["kernel"] for row in found["optimizer"]} == set(choice.OPTIONS["adam"])


def test_bench_gpu_writes_rows_as_they_come(tmp_path: Path) -> None:
    result = gpu.run(tiny=True, output=str(tmp_path / "rows.jsonl"), cases=["ceilings"])
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == result["rows"] and not result["failed"] and not result["left_out"]
    assert result["ceilings"]["matmul_tflops"] > 0 and result["ceilings"]["copy_gb_per_second"] > 0
    with pytest.raises(UserError, match="unknown case 'dit'"):
        gpu.run(tiny=True, cases=["dit"])


def test_a_case_that_fails_or_hangs_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cases after it have their turn."""
    for words, told in (
        ("import sys; print('over'); sys.exit(3)", "code 3"),
        ("import time; time.sleep(60)", "not done"),
    ):
        monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", words])
        with (tmp_path / "log").open("w") as log:
            worker = gpu.Worker("ceilings", "cpu", True, log)
            worker.go([])
            (row,) = worker.rows(1.0)
        assert row["row"] == "failed" and told in row["error"], row


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matmul",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)": "matmul",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x80_4x1x1_kernel0_0": "attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>(Flash_fwd_params)": "attention",
        "triton_per_fused__scaled_dot_product_cudnn_attention_native_layer_norm_3": "fused",
        "norm_modulate_backward": "fused",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>()": "optimizer",
        "update_weights": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)": "elementwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
    }
    assert {name: profile.kind_of(name) for name in names} == names
    assert profile.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4


def test_the_plan_is_put_beside_what_was_measured() -> None:
    step = {"row": "step", "micro_batch": 128, "gib": 3.0, "ms": 9.0}
    rows = [{"case": name, **step} for name in ("small_local", "small_diffusers", "valle_zero3", "dit_fp8")]
    result = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-11-27", "rows": rows}
    (said,) = beside(result)
    assert said["case"] == "small_local" and said["planned_ms"] > 0
    assert said["memory"] == said["planned_gib"] / 3.0 and said["time"] == said["planned_ms"] / 9.0
    assert said["off"] == ["memory", "time"]


def test_ratios_are_taken_at_a_micro_batch_that_both_have() -> None:
    def step(case: str, micro: int, speed: float, mfu: float) -> dict[str, Any]:
        return {
            "case": case,
            "row": "step",
            "micro_batch": micro,
            "samples_per_second": speed,
            "ms": 1e3 * micro / speed,
            "mfu": mfu,
        }

    rows = [step("dit_zero3", 64, 480, 0.4), step("dit_zero3", 96, 500, 0.43), step("dit_local", 64, 500, 0.42)]
    result = gpu.summary(rows, [], "cpu", False)
    assert "rows: 3, whole with --json" in show(result)
    missing = {"case": "attention", "row": "attention", "kernel": "apex", "unavailable": "apex is not installed"}
    assert gpu._told(missing) == "attention attention apex: apex is not installed"
    figures = result["figures"]
    assert figures["dit_zero3_over_local"] == {"measured": 0.96, "wanted": 0.95, "reached": True}
    assert figures["dit_zero3_mfu"]["measured"] == 0.43 and "sd3_zero3_mfu" not in figures
    assert measuring.fitting(64, held=20, peak=84, limit=73.6) == 48
