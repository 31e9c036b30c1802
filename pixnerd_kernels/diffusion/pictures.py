"""Drawing images of given classes or texts, and putting them into files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.diffusion.flow import scale_data, scale_noise
from pixnerd_kernels.diffusion.solvers import sample, time_steps
from pixnerd_kernels.models import PixNerd, PixNerdT2I
from pixnerd_kernels.nn import scaled_patch

#: Images that go through the model at once; part of what makes a drawing reproducible to the bit.
BATCH = 64

#: When drawing finer than trained goes over to the fine resolution, by default: late enough that the patches have
#: settled what they show together, early enough that the edges are drawn by the fields.
FINE_FROM = 0.8


def decoder_scale(model: PixNerd | PixNerdT2I, size: int, trained_size: int) -> tuple[float, float]:
    """The scale that makes a model trained on square images of `trained_size` pixels draw `size` pixels.

    Raises:
        ValueError: the patches do not tile that size; the message names the sizes around it that work.
    """
    patch = model.config.patch_size
    if trained_size % patch or trained_size <= 0:
        raise ValueError(f"trained_size: expected a multiple of the patch size {patch}, got {trained_size}")
    rows = trained_size // patch
    scale = size / trained_size
    if size <= 0 or scaled_patch(patch, (scale, scale))[0] * rows != size:
        below = max(size // rows, 1) * rows
        raise ValueError(
            f"size: expected a multiple of {rows}, the patches along an edge of this model's images "
            f"(such as {below} or {below + rows}), got {size}"
        )
    return scale, scale


def draw(
    model: PixNerd,
    classes: Sequence[int],
    size: int,
    *,
    trained_size: int,
    fine_from: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
    **solver: object,
) -> Tensor:
    """One square image for each entry of `classes`: [n, C, size, size] in about [-1, 1], float32 on the CPU.

    Image i depends on the seed, i and its class alone (to rounding: not on how many are drawn). Every size
    starts from the same noise, see `flow.scale_noise`, so that a size draws the same image as another, finer
    or coarser.

    Args:
        classes: class ids.
        size, trained_size: pixels of an edge, to draw and as trained.
        fine_from: where size is above trained_size, the time from which x is of that size; before, it has the trained
            one. Every pixel between two trained ones follows a path of its own, and pixels on two sides of a patch's
            edge may part early; late, both start from what the trained ones have agreed on. 0 is all the way;
            None is 0.8, or 0 for a model whose coordinates move with the resolution (an official one).
        on_step: called with the number of solver steps done and the images of one batch of at most `BATCH`, [b, C,
            size, size].
        solver: arguments of `sample`: solver, num_steps, order, guidance ...

    Raises:
        TypeError, ValueError: a class out of range, or a size that the patches do not tile.
    """
    problems = Problems("draw")
    for label in dict.fromkeys(classes):
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < model.null_class:
            problems.add("class", f"a class from 0 to {model.null_class - 1}", label)
    problems.raise_if_any()
    device = next(model.parameters()).device
    conditions = torch.tensor(classes, dtype=torch.long, device=device)
    null = torch.tensor(model.null_class, device=device)
    if fine_from is None:
        fine_from = FINE_FROM if model.config.encoding == "dct_aligned" else 0.0
    return _draw(model, conditions, null, size, trained_size, fine_from, seed, on_step, solver)


def draw_texts(
    model: PixNerdT2I,
    features: Tensor,
    null_features: Tensor | None,
    size: int,
    *,
    trained_size: int,
    fine_from: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
    **solver: object,
) -> Tensor:
    """`draw` with a text-to-image model: one image for each text.

    Args:
        features: [n, text_tokens, text_width], of a text encoder.
        null_features: [text_tokens, text_width], of an empty text; None only at guidance 1.
        size, trained_size, fine_from, seed, on_step, solver: as in `draw`, but that None is 0: text-to-image
            models encode by "rope".

    Raises:
        TypeError, ValueError: features of another shape, or a size that the patches do not tile.
    """
    shape = (model.config.text_tokens, model.config.text_width)
    problems = Problems("draw_texts")
    if (
        problems.tensor("features", features, 3, "[n, text_tokens, text_width]")
        and features.shape[1:] != shape
    ):
        problems.add("features", f"the shape [n, {shape[0]}, {shape[1]}]", features)
    if null_features is None:
        if solver.get("guidance", 1.0) != 1:
            problems.add("null_features", f"those of an empty text {list(shape)} (guidance needs them)", None)
    elif (
        problems.tensor("null_features", null_features, 2, str(list(shape))) and null_features.shape != shape
    ):
        problems.add("null_features", f"the shape {list(shape)}", null_features)
    problems.raise_if_any()
    like = next(model.parameters())
    null = None if null_features is None else null_features.to(like)
    return _draw(model, features.to(like), null, size, trained_size, fine_from or 0.0, seed, on_step, solver)


def _draw(
    model: PixNerd | PixNerdT2I,
    conditions: Tensor,
    null: Tensor | None,
    size: int,
    trained_size: int,
    fine_from: float,
    seed: int,
    on_step: Callable[[int, Tensor], None] | None,
    solver: Mapping[str, Any],
) -> Tensor:
    problems = Problems("draw")
    problems.count("num_steps", solver.get("num_steps"))
    if "span" in solver:
        problems.add("span", "none: all steps are drawn", solver["span"])
    if problems.number("fine_from", fine_from) and fine_from >= 1:
        problems.add("fine_from", "a time from 0 to below 1", fine_from)
    problems.raise_if_any()
    scale = decoder_scale(model, size, trained_size)
    times = time_steps(
        solver["num_steps"], timeshift=solver.get("timeshift", 1.0), last_step=solver.get("last_step")
    )
    coarse_steps = min(int((times < fine_from - 1e-6).sum()), len(times) - 2) if size > trained_size else 0
    like = next(model.parameters())
    channels = model.config.in_channels
    generator = torch.Generator().manual_seed(seed)  # the CPU's, whatever the default device
    shape = (channels, trained_size, trained_size)
    white = (torch.randn(shape, generator=generator, device="cpu") for _ in conditions)
    noise = [image if coarse_steps else scale_noise(image, size) for image in white]
    drawn = [torch.empty(0, channels, size, size)]
    for start in range(0, len(conditions), BATCH):
        x = torch.stack(noise[start : start + BATCH]).to(like)
        condition = conditions[start : start + BATCH]
        uncondition = None if null is None else null.expand_as(condition)

        def run(x: Tensor, span: tuple[int, int], **options: Any) -> Tensor:
            at = scale if x.shape[-1] == size else (1.0, 1.0)
            return sample(
                lambda x, t, y: model(x, t, y, decoder_scale=at).to(x.dtype),
                x, condition, uncondition, span=span, **{**solver, **options},  # noqa: B023
            )  # fmt: skip

        if coarse_steps:
            x = run(x, (0, coarse_steps), on_step=_enlarging(on_step, size))
            ahead = run(x, (coarse_steps, coarse_steps + 1), solver="euler")
            now, then = times[coarse_steps : coarse_steps + 2].tolist()
            x = _finer(x, (ahead - x) / (then - now), now, size)
        drawn.append(run(x, (coarse_steps, solver["num_steps"]), on_step=on_step).float().cpu())
    return torch.cat(drawn)


def _finer(x: Tensor, velocity: Tensor, t: float, size: int) -> Tensor:
    """x [B, C, n, n] at time t as the point of the path at [B, C, size, size]: the data and the noise that the velocity
    tells apart, each enlarged as in training."""
    data, noise = x + (1 - t) * velocity, x - t * velocity
    return t * scale_data(data, size) + (1 - t) * scale_noise(noise, size)


def _enlarging(
    on_step: Callable[[int, Tensor], None] | None, size: int
) -> Callable[[int, Tensor], None] | None:
    """on_step for coarse images."""
    if on_step is None:
        return None
    return lambda done, x: on_step(done, F.interpolate(x, (size, size)))


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, values outside clipped."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """[n, C, H, W] in [-1, 1] to one picture on grey, uint8 [rows * (H + gap) + gap, ..., C]."""
    problems = Problems("grid")
    if problems.tensor("images", images, 4, "[n, C, H, W]") and not len(images):
        problems.add("images", "at least one image", images)
    if columns is not None:
        problems.count("columns", columns)
    problems.raise_if_any()
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    picture = torch.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, dtype=torch.uint8
    )
    for index, image in enumerate(to_bytes(images)):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return picture


def save_png(path: str | Path, picture: Tensor) -> None:
    """Write a uint8 picture [H, W, 1 or 3]; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _image(picture).save(path)


def save_gif(path: str | Path, pictures: Sequence[Tensor], seconds: float = 3.0) -> None:
    """Write pictures as an endless animation that takes `seconds`, and rests on the last one for a second."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [_image(picture) for picture in pictures]
    durations = [max(20, round(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _image(picture: Tensor):  # type: ignore[no-untyped-def]
    from PIL import Image

    array = picture.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_loss_curve(path: str | Path, losses: Tensor) -> None:
    """Plot the loss of every step, faint, and its mean over a hundredth of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = torch.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 100)
    whole = len(losses) // window * window
    axes.plot(steps, losses, linewidth=0.5, alpha=0.3, label="each step")
    mean = losses[:whole].view(-1, window).mean(1)
    axes.plot(steps[:whole].view(-1, window)[:, -1], mean, label=f"mean of {window}")
    axes.set_xlabel("step")
    axes.set_ylabel("flow-matching loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
