"""The training loop: progress, sample grids and checkpoints on the way, and a clean end at Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pixnerd_kernels.diffusion import pictures
from pixnerd_kernels.training.trainer import Trainer

CHECKPOINT = "checkpoint.safetensors"


def train(
    trainer: Trainer,
    folder: str | Path,
    *,
    save_every: int = 500,
    sample_every: int = 500,
    sample_steps: int = 20,
    guidance: float = 2.0,
    quiet: bool = False,
) -> bool:
    """Run a trainer to its last step; True when it got there, False when it was interrupted.

    Into folder go ``checkpoint.safetensors``, ``loss.png`` and ``samples/step_<n>.png`` (a row for each of at
    most ten classes). Ctrl-C and SIGTERM finish the current step and save; a second Ctrl-C stops at once.

    Args:
        save_every, sample_every: steps between checkpoints and between sample grids; 0 is only at the end.
        sample_steps, guidance: how the grids are drawn.
        quiet: without a progress bar.

    Raises:
        OSError: a checkpoint could not be saved.
        FloatingPointError: the loss is not finite.
    """
    from tqdm import tqdm

    folder = Path(folder)
    total, batch = trainer.settings.steps, trainer.settings.batch_size
    saved = -1
    with (
        _interruption() as stop,
        tqdm(total=total, initial=trainer.steps_done, unit="step", disable=quiet, dynamic_ncols=True) as bar,
    ):
        start, smooth = time.perf_counter(), None
        while trainer.steps_done < total and not stop.is_set():
            loss = trainer.step()
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            bar.update()
            speed = batch / max(time.perf_counter() - start, 1e-9)
            start = time.perf_counter()
            bar.set_postfix(loss=f"{smooth:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
            done = trainer.steps_done
            # First saved, then drawn: a picture that cannot be written costs no steps.
            if save_every and done % save_every == 0:
                _save(trainer, folder)
                saved = done
            if sample_every and done % sample_every == 0 and done < total:
                _draw(trainer, folder, sample_steps, guidance)

        if saved != trainer.steps_done:
            _save(trainer, folder)
        finished = trainer.steps_done >= total
        if finished:
            _draw(trainer, folder, sample_steps, guidance)
    return finished


def _save(trainer: Trainer, folder: Path) -> None:
    import torch

    trainer.save(folder / CHECKPOINT)
    pictures.save_loss_curve(folder / "loss.png", torch.tensor(trainer.losses))


def _draw(trainer: Trainer, folder: Path, steps: int, guidance: float) -> None:
    shown, columns = min(len(trainer.dataset.classes), 10), 8
    images = pictures.draw(
        trainer.ema,
        [label for label in range(shown) for _ in range(columns)],
        trainer.settings.size,
        trained_size=trainer.settings.size,
        seed=trainer.settings.seed,
        solver="adams",
        num_steps=steps,
        guidance=guidance,
    )
    pictures.save_png(
        folder / "samples" / f"step_{trainer.steps_done:06d}.png", pictures.grid(images, columns)
    )


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C acts as usual. Only the main thread sees them."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
