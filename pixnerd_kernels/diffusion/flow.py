"""The rectified-flow path from noise (t = 0) to data (t = 1), and the loss of a velocity model on it.

    x_t = t data + (1 - t) noise,    v = dx_t/dt = data - noise,    loss = mean (model(x_t, t, y) - v)²

Images are [B, C, H, W] in [-1, 1], times [B] in [0, 1]. Source: PixNerd (arXiv 2507.23268), section 3, and
its official trainer without the feature-alignment term.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from pixnerd_kernels.checks import Problems


def shift_time(t: Tensor, shift: float = 1.0) -> Tensor:
    """t / (t + (1 - t) shift): a shift above 1 moves times towards the noise; 1 changes nothing."""
    return t / (t + (1 - t) * shift)


def sample_times(
    batch: int,
    *,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Log-normal times: `shift_time` of sigmoid(normal), [batch] float32."""
    return shift_time(torch.randn(batch, generator=generator, device=device).sigmoid(), shift)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t in data's shape [B, ...] and dtype, a floating one; noise is of that shape, t is [B].

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
    """
    problems = Problems("flow.interpolate")
    if not isinstance(data, Tensor) or not data.is_floating_point() or data.dim() == 0:
        problems.add_type("data", "a floating tensor [B, ...]", data)
    else:
        for name, value, shape in (("noise", noise, data.shape), ("t", t, data.shape[:1])):
            if not isinstance(value, Tensor) or value.shape != shape:
                problems.add(name, f"a tensor {list(shape)}", value)
    problems.raise_if_any()
    weight = t.to(data.dtype).view(-1, *(1,) * (data.dim() - 1))
    return weight * data + (1 - weight) * noise.to(data.dtype)


def scale_noise(noise: Tensor, size: int) -> Tensor:
    """Square noise [..., n, n] at another resolution, [..., size, size]; each pixel stays normal with variance 1.

    Linear interpolation with weights of unit norm; pixel j lies at j n / size, so that the nearest copy that
    the transformer sees of it is the noise that came in. Independent noise at the finer resolution would do
    as well for the formulas, but the transformer sees n x n pixels of it, and every other pixel would settle
    alone: whatever is still open when it does comes out dithered. Pixels with common noise settle together.
    """
    _check_size("scale_noise", size)
    n = noise.shape[-1]
    place = torch.arange(size, device=noise.device) * (n / size)
    left = place.long()
    right = (left + 1).clamp(max=n - 1)
    share = torch.where(right > left, place - left, 0.0)[:, None]
    identity = torch.eye(n, device=noise.device)
    weights = torch.nn.functional.normalize((1 - share) * identity[left] + share * identity[right], dim=1)
    weights = weights.to(noise.dtype)
    return weights @ noise @ weights.T


def scale_data(data: Tensor, size: int) -> Tensor:
    """Square images [B, C, n, n] at another resolution, [B, C, size, size]; bicubic, and not clipped.

    Pixel j lies at j n / size, as in `scale_noise`.
    """
    _check_size("scale_data", size)
    n = data.shape[-1]
    if n == size:
        return data
    position = torch.arange(size, device=data.device, dtype=data.dtype) * (2 * n / size / max(n - 1, 1)) - 1
    places = torch.stack(torch.meshgrid(position, position, indexing="xy"), dim=-1)
    places = places.expand(len(data), -1, -1, -1)
    return torch.nn.functional.grid_sample(data, places, "bicubic", "border", align_corners=True)


def _check_size(where: str, size: object) -> None:
    problems = Problems(where)
    problems.count("size", size)
    problems.raise_if_any()


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """The path's velocity, the same at every t."""
    return data - noise


def drop_conditions(
    y: Tensor, null: int | Tensor, probability: float = 0.1, *, generator: torch.Generator | None = None
) -> Tensor:
    """y [B, ...] with each image's condition replaced by `null` at this probability (classifier-free guidance).

    null is the id of "no class" for class ids [B], or for text features [B, tokens, width] those of an empty
    prompt, [tokens, width].
    """
    drawn = torch.rand(y.shape[:1], generator=generator, device=y.device)
    dropped = (drawn < probability).view(-1, *(1,) * (y.dim() - 1))
    return torch.where(dropped, torch.as_tensor(null, dtype=y.dtype, device=y.device), y)


def loss(
    model: Callable[..., Tensor],
    data: Tensor,
    y: Tensor,
    *,
    null: int | Tensor,
    noise: Tensor | None = None,
    dropout: float = 0.1,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    **model_arguments: object,
) -> Tensor:
    """The flow-matching loss of one batch, a scalar in float32 at least.

    Args:
        model: called as model(x_t, t, y, **model_arguments), returns the velocity in x_t's shape.
        data: [B, C, H, W] in [-1, 1]. y: [B] class ids, or [B, tokens, width] text features.
        null, dropout: as in `drop_conditions`. shift: as in `shift_time`.
        noise: of data's shape; None draws it, independent in every pixel.
        generator: source of times, noise and dropped conditions, on data's device; None is torch's global one.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
    """
    problems = Problems("flow.loss")
    if problems.tensor("data", data, 4, "[B, C, H, W]"):
        if not data.numel():
            problems.add("data", "at least one image", data)
        if not isinstance(y, Tensor) or y.shape[:1] != data.shape[:1]:
            problems.add("y", f"a tensor with a condition for each of the {data.shape[0]} images", y)
        if noise is not None and (not isinstance(noise, Tensor) or noise.shape != data.shape):
            problems.add("noise", f"a tensor of the shape of data {list(data.shape)}", noise)
    if not isinstance(null, (Integral, Tensor)):
        problems.add_type("null", "a class id, or the features of an empty text", null)
    elif isinstance(y, Tensor) and (null.shape if isinstance(null, Tensor) else ()) != y.shape[1:]:
        problems.add("null", f"the shape of one image's condition {list(y.shape[1:])}", null)
    for name, value, least, most in (("dropout", dropout, 0.0, 1.0), ("shift", shift, 1e-30, 1e30)):
        problems.number(name, value, least, most)
    problems.raise_if_any()
    t = sample_times(data.shape[0], shift=shift, generator=generator, device=data.device)
    if noise is None:
        noise = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
    y = drop_conditions(y, null, dropout, generator=generator)
    velocity = model(interpolate(data, noise, t), t, y, **model_arguments)
    if not isinstance(velocity, Tensor) or velocity.shape != data.shape:
        problems.add("model", f"a velocity of the shape of data {list(data.shape)}", velocity)
        problems.raise_if_any()
    target = velocity_target(data, noise)
    return (velocity.to(torch.promote_types(velocity.dtype, torch.float32)) - target).square().mean()
