"""The launches that are compiled ahead of time: every Triton kernel at the shapes that it is made for.

An op that gains a Triton kernel adds calls of its launchers here, on meta tensors; `python -m benchmarks resources` and
the tests compile whatever they launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import Launch, Target, capture

#: GPUs that the kernels are compiled for, by the name of their architecture.
TARGETS = {
    "sm_80": Target("cuda", 80, 108, "NVIDIA A100"),
    "sm_90": Target("cuda", 90, 132, "NVIDIA H100"),
    "sm_100": Target("cuda", 100, 148, "NVIDIA B200"),
    "gfx942": Target("hip", "gfx942", 304, "AMD MI300X"),
}


@dataclass(frozen=True)
class Production:
    """A call of launchers, and the architectures that it is compiled for."""

    run: Callable[[], object]
    targets: tuple[str, ...] = tuple(TARGETS)
    #: Whether its products have the 64 rows that the newest tensor-core instructions want.
    tensor_cores: bool = True
    #: Whether a kernel may keep more than fits into registers.
    may_spill: bool = False
    #: Bytes that a forward may: counters and addresses that are read back once for each patch or tile.
    spills: int = 0

    def launches(self, target: str) -> list[Launch]:
        """What the call launches on this GPU, without running it."""
        with capture(TARGETS[target]) as launches:
            self.run()
        return launches


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launchers(op: str) -> Any:
    return importlib.import_module(f"pixnerd_kernels.ops.{op}.triton")


def _field(
    n: int, s: int, d1: int, d2: int, dtype: torch.dtype, gated: bool = False, backward: bool = True
) -> Callable[[], object]:
    """Forward and backward of a block on packed weights, as PixNerd's and Radiance's generators write them."""

    def run() -> None:
        from pixnerd_kernels.ops.neural_field_mlp import split_params

        triton = _launchers("neural_field_mlp")
        x, params = _empty(n, s, d1, dtype=dtype), _empty(n, (3 if gated else 2) * d1 * d2, dtype=dtype)
        weights = split_params(params, d1, d2, gated)
        norm_weight = _empty(d1, dtype=torch.float32)
        options = ((True, True, True), "silu", True, 1e-6, 1e-12)
        triton.forward(x, *weights, norm_weight, *options)
        if backward:
            targets = split_params(torch.empty_like(params), d1, d2, gated)
            triton.backward(x, x, *weights, norm_weight, True, targets, *options)

    return run


def _tangents(
    n: int, d1: int, d2: int, dtype: torch.dtype, gated: bool = False, decoder: bool = False
) -> Callable[[], object]:
    """A block's value and tangent where everything moves; in a decoder its pixels are float32."""

    def run() -> None:
        from pixnerd_kernels.ops.neural_field_mlp import split_params

        x = _empty(n, 256, d1, dtype=torch.float32 if decoder else dtype)
        weights = split_params(_empty(n, (3 if gated else 2) * d1 * d2, dtype=dtype), d1, d2, gated)
        norm_weight = _empty(d1, dtype=torch.float32)
        options = ((True, True, True), "silu", True, 1e-6, 1e-12)
        _launchers("neural_field_mlp").jvp(x, *weights, norm_weight, x, *weights, *options)

    return run


def _weights(n: int, rows: int, columns: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        triton = _launchers("normalize_weights")
        w = _empty(n, rows, columns, dtype=dtype)
        triton.forward(w, 1, 1e-12)
        triton.backward(w, w, 1, 1e-12)

    return run


def _encoding(height: int, width: int, count: int, kind: str) -> Callable[[], object]:
    device = torch.device("meta")
    return lambda: _launchers("coordinate_encoding").forward(
        height, width, count, kind, 1.0, 1.0, device, torch.bfloat16
    )


def _decoder(
    patches: int,
    size: int,
    blocks: int,
    d1: int,
    d2: int,
    dtype: torch.dtype,
    gated: bool = False,
    inputs: int = 3,
) -> Callable[[], object]:
    """Forward and backward of the decoder on a chunk of patches of one image, 16 a line, with every gradient."""

    def run() -> None:
        from pixnerd_kernels.ops.pixel_decoder.chunks import AUTO, Call

        triton = _launchers("pixel_decoder")
        rows = (3 if gated else 2) * d1 * d2
        height, width = patches // 16 * size, 16 * size
        image = _empty(1, inputs, height, width, dtype=dtype)
        wide = {"dtype": torch.float32}
        call = Call(
            image, _empty(1, patches, 8, dtype=dtype), _empty(d1, inputs + 64, **wide), _empty(d1, **wide),
            [_empty(rows, 8, dtype=dtype)] * blocks, [], [_empty(d1, **wide)] * blocks, _empty(d1, **wide),
            None if gated else _empty(3, d1, **wide), None if gated else _empty(3, **wide),
            (size, size), "dct", 8, (1.0, 1.0), gated, (True, True, True), "silu", 1e-6, 1e-12, AUTO,
        )  # fmt: skip
        generated = _empty(blocks, patches, rows, dtype=dtype)
        out = _empty(1, call.out_channels, height, width, dtype=dtype)
        triton.forward(call, generated, 0, out)
        sums = _empty(sum(torch.Size(shape).numel() for _, shape in call.sums()), dtype=torch.float64)
        triton.backward(call, generated, 0, out, image, generated, sums)

    return run


def _modulated_norm(batch: int, tokens: int, size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The norms and residuals of a DiT block, alone and joined: forward, backward, and value and tangent."""

    def run() -> None:
        norm, residual = _launchers("modulated_rms_norm"), _launchers("gated_residual")
        x, row = _empty(batch, tokens, size, dtype=dtype), _empty(batch, 1, size, dtype=dtype)
        weight = _empty(size, dtype=torch.float32)
        norm.forward(x, weight, row, row, 1e-6)
        norm.backward(x, x, weight, True, row, 1e-6)
        residual.forward(x, x, row)
        residual.backward(x, x, row)
        residual.norm_forward(x, x, row, weight, row, row, 1e-6)
        residual.norm_backward(x, x, x, x, row, weight, True, row, 1e-6)
        norm.jvp(x, weight, row, row, x, row, row, 1e-6)
        residual.jvp(x, x, row, x, x, row)
        residual.norm_jvp(x, x, row, weight, row, row, (x, x, row, row, row), 1e-6)

    return run


def _swiglu(rows: int, columns: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        triton = _launchers("swiglu")
        gate, up = _empty(rows, 2 * columns, dtype=dtype).chunk(2, dim=1)
        triton.forward(gate, up)
        triton.backward(torch.empty_like(gate), gate, up, torch.empty_like(gate), torch.empty_like(up))
        triton.jvp(gate, up, gate, up)

    return run


def _qk(
    batch: int, tokens: int, heads: int, channels: int, text: int, dtype: torch.dtype
) -> Callable[[], object]:
    def run() -> None:
        triton = _launchers("qk_norm_rope")
        qkv = _empty(batch, tokens, 3, heads, channels, dtype=dtype)
        text_kv = _empty(batch, text, 2, heads, channels, dtype=dtype) if text else None
        weight = _empty(channels, dtype=torch.float32)
        rope = _empty(tokens, channels // 2, 2, dtype=torch.float32)
        q, k, v = triton.forward(qkv, weight, weight, rope, text_kv, 1e-6)
        triton.backward(q, k, v, qkv, weight, weight, rope, text_kv, 1e-6)
        triton.jvp(qkv, weight, weight, rope, text_kv, qkv, text_kv, 1e-6)

    return run


_HOPPER = ("sm_90",)
PRODUCTION: dict[str, Production] = {
    "field 64x128 bf16": Production(_field(16384, 256, 64, 128, torch.bfloat16)),
    "field 64x256 gated bf16": Production(_field(4096, 256, 64, 256, torch.bfloat16, gated=True)),
    "field 64x128 fp16": Production(_field(16384, 256, 64, 128, torch.float16), _HOPPER, spills=16),
    "field 64x128 fp32": Production(
        _field(16384, 256, 64, 128, torch.float32), ("sm_80", "sm_90"), tensor_cores=False, may_spill=True
    ),
    "field 64x128 of 64 pixels bf16": Production(_field(65536, 64, 64, 128, torch.bfloat16), _HOPPER),
    "field 12x24 of 20 pixels bf16": Production(
        _field(65536, 20, 12, 24, torch.bfloat16), _HOPPER, tensor_cores=False
    ),
    "field 256x512 bf16": Production(
        _field(4096, 256, 256, 512, torch.bfloat16), _HOPPER, tensor_cores=False, may_spill=True
    ),
    "tangents 64x128 bf16": Production(_tangents(16384, 64, 128, torch.bfloat16), tensor_cores=False),
    "tangents 64x128 of a decoder bf16": Production(
        _tangents(16384, 64, 128, torch.bfloat16, decoder=True), _HOPPER, tensor_cores=False
    ),
    "tangents 64x256 gated bf16": Production(
        _tangents(4096, 64, 256, torch.bfloat16, gated=True), ("sm_90", "sm_100"), tensor_cores=False
    ),
    "tangents 64x128 fp32": Production(
        _tangents(16384, 64, 128, torch.float32), _HOPPER, tensor_cores=False, may_spill=True
    ),
    "decoder of 4 blocks 64x128 bf16": Production(_decoder(512, 16, 4, 64, 128, torch.bfloat16), spills=24),
    # Loops over channels that are none any more have broken the pipelining of those around them.
    "decoder of 4 blocks 64x128 of one channel bf16": Production(
        _decoder(512, 16, 4, 64, 128, torch.bfloat16, inputs=1), _HOPPER, spills=24
    ),
    "decoder of 4 blocks 64x128 fp32": Production(
        _decoder(512, 16, 4, 64, 128, torch.float32), _HOPPER, tensor_cores=False, may_spill=True
    ),
    "decoder of 4 gated blocks 64x256 bf16": Production(
        _decoder(512, 16, 4, 64, 256, torch.bfloat16, gated=True), ("sm_90", "sm_100"), spills=96
    ),
    "weights 64x128 bf16": Production(
        _weights(16384, 64, 128, torch.bfloat16), ("sm_90", "gfx942"), tensor_cores=False
    ),
    "norm 1152 bf16": Production(_modulated_norm(64, 256, 1152, torch.bfloat16), tensor_cores=False),
    "norm 1152 fp32": Production(_modulated_norm(64, 256, 1152, torch.float32), _HOPPER, tensor_cores=False),
    "swiglu 3072 bf16": Production(_swiglu(16384, 3072, torch.bfloat16), tensor_cores=False),
    "heads 16x72 bf16": Production(_qk(64, 256, 16, 72, 0, torch.bfloat16), tensor_cores=False),
    "heads 24x64 with text bf16": Production(
        _qk(16, 1024, 24, 64, 128, torch.bfloat16), _HOPPER, tensor_cores=False
    ),
    # The stack that these use belongs to the library's float64 cosine.
    "encoding dct": Production(
        _encoding(16, 16, 8, "dct"), ("sm_90", "gfx942"), tensor_cores=False, may_spill=True
    ),
    "encoding rope": Production(_encoding(16, 16, 8, "rope"), _HOPPER, tensor_cores=False, may_spill=True),
}
