"""The official class-to-image PixNerd in plain PyTorch, from its recorded parameters; its head runs `field`."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulas

Parameters = Mapping[str, Tensor]


def linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def patches(image: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, C * size * size], channels outermost."""
    return F.unfold(image, size, stride=size).transpose(1, 2)


def time_embedding(parameters: Parameters, t: Tensor) -> Tensor:
    """[B] -> [B, 1, D]; the slowest of 128 frequencies is 1/10 of the fastest."""
    angles = t[:, None] * torch.exp(-math.log(10) * torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    hidden = F.silu(linear(parameters, "t_embedder.mlp.0", waves))
    return linear(parameters, "t_embedder.mlp.2", hidden)[:, None]


def rotary(height: int, width: int, head: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [height * width, head / 2]: x and y interleaved, positions linspace(0, 16, n).

    The official code multiplies complex numbers, for which torch's compiler generates no code.
    """
    speed = 10000.0 ** (-torch.arange(0, head, 4)[: head // 4] / head)
    x = torch.outer(torch.linspace(0, 16, width), speed).expand(height, -1, -1)
    y = torch.outer(torch.linspace(0, 16, height), speed)[:, None].expand(-1, width, -1)
    angles = torch.stack([x, y], -1).reshape(height * width, -1)
    return angles.cos(), angles.sin()


def rotate(z: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channels of z [B, L, heads, d] by the table's angles."""
    cos, sin = (part[:, None].to(z.dtype) for part in turn)
    a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attend(parameters: Parameters, name: str, x: Tensor, heads: int, turn: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = linear(parameters, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(2)

    def turned(z: Tensor, norm: str) -> Tensor:
        return rotate(rms_norm(z, parameters[f"{name}.{norm}.weight"]), turn)

    q, k = turned(q, "q_norm"), turned(k, "k_norm")
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return linear(parameters, f"{name}.proj", out.transpose(1, 2).flatten(2))


def dit_block(
    parameters: Parameters, name: str, x: Tensor, condition: Tensor, heads: int, turn: tuple[Tensor, Tensor]
) -> Tensor:
    modulation = linear(parameters, f"{name}.adaLN_modulation.0", condition)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
    h = rms_norm(x, parameters[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
    x = x + gate1 * attend(parameters, f"{name}.attn", h, heads, turn)
    h = rms_norm(x, parameters[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
    h = F.silu(linear(parameters, f"{name}.mlp.w1", h)) * linear(parameters, f"{name}.mlp.w3", h)
    return x + gate2 * linear(parameters, f"{name}.mlp.w2", h)


def forward(
    parameters: Parameters,
    config: Mapping[str, int],
    x: Tensor,
    t: Tensor,
    y: Tensor,
    encoding: Tensor,
    field: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Velocity [B, C, H, W]; `field` takes pixels, generated parameters and the norm's weight of one block."""
    size, first_field = config["patch_size"], config["num_cond_blocks"]
    height, width = x.shape[2:]
    tokens = patches(x, size)
    time = time_embedding(parameters, t)
    condition = F.silu(time + parameters["y_embedder.embedding_table.weight"][y][:, None])
    turn = rotary(height // size, width // size, config["hidden_size"] // config["num_groups"])
    s = linear(parameters, "s_embedder.proj", tokens)
    for block in range(first_field):
        s = dit_block(parameters, f"blocks.{block}", s, condition, config["num_groups"], turn)
    s = F.silu(time + s).flatten(0, 1)
    pixels = tokens.reshape(len(s), config["in_channels"], -1).transpose(1, 2)
    pixels = torch.cat([pixels, encoding.expand(len(s), -1, -1)], -1)
    pixels = linear(parameters, "x_embedder.embedder.0", pixels)
    for block in range(first_field, config["num_blocks"]):
        generated = linear(parameters, f"blocks.{block}.param_generator1.0", s)
        pixels = field(pixels, generated, parameters[f"blocks.{block}.norm.weight"])
    out = linear(parameters, "final_layer.linear", rms_norm(pixels, parameters["final_layer.norm.weight"]))
    # F.fold in the official code, which torch 2.13's compiler gets wrong on a CPU for a transposed input.
    out = out.view(len(x), height // size, width // size, size, size, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)


def plain(parameters: Parameters, config: Mapping[str, int], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The whole model in plain PyTorch: velocity [B, C, H, W]."""
    size, channels = config["patch_size"], config["hidden_size_x"]
    hidden = channels * config["nerf_mlpratio"]
    encoding = formulas.dct_encoding(size, size, config.get("max_freqs", 8), x.dtype)

    def field(pixels: Tensor, generated: Tensor, norm_weight: Tensor) -> Tensor:
        w1, w2 = generated.chunk(2, -1)
        w1, w2 = w1.view(-1, channels, hidden), w2.view(-1, hidden, channels)
        return formulas.neural_field(pixels, w1, w2, norm_weight)

    return forward(parameters, config, x, t, y, encoding, field)
