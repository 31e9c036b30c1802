"""What `patch` did to each module, or why it did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pixnerd_kernels.patching.swap import Replacement, replacement_of, restore


@dataclass(frozen=True)
class Entry:
    """One module that a rule knows, or nearly.

    Attributes:
        name: its path in the model; empty for the model itself.
        module: its class.
        op: the op that the rule puts in.
        status: "replaced", "would replace" (a dry run) or "left".
        form: which of the forms that share this structure it computes; empty where that was not found out.
        error: ||ours - exact|| / ||exact|| on the probe; None without one.
        original_error: the same for the module's own result.
        reason: why it was left, or a remark.
        also: further paths of the same module.
    """

    name: str
    module: str
    op: str
    status: str
    form: str = ""
    error: float | None = None
    original_error: float | None = None
    reason: str = ""
    also: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.name or "(the model)"


@dataclass
class Report:
    """The entries, and the way back.

    `print(report)` shows a table, `report.data()` gives plain values. `others` counts the modules that no rule knows.
    """

    entries: list[Entry]
    others: int = 0
    _patched: list[tuple[str, nn.Module, Replacement]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        """The entries that were replaced (in a dry run: would be)."""
        return [entry for entry in self.entries if entry.status != "left"]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "left"]

    def data(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return {"entries": [asdict(entry) for entry in self.entries], "others": self.others}

    def unpatch(self) -> None:
        """Give every module that this call patched its own method back; a second call does nothing.

        Raises:
            RuntimeError: something else has changed a module's class since, or patched it anew; the others are
                restored, and the message names these.
        """
        problems, stuck = [], []
        for name, module, replacement in self._patched:
            try:
                if replacement_of(module) is not None:
                    restore(module)
            except RuntimeError as error:
                problems.append(f"{name or '(the model)'}: {error}")
                stuck.append((name, module, replacement))
        self._patched = stuck
        if problems:
            raise RuntimeError("unpatch: " + "; ".join(problems))

    def __str__(self) -> str:
        rows = [["module", "class", "op", "what", "error (was)", "why"]]
        for entry in self.entries:
            name = entry.label + (f" (= {', '.join(entry.also)})" if entry.also else "")
            error = "" if entry.error is None else f"{entry.error:.1e} ({entry.original_error:.1e})"
            what = entry.status + (f": {entry.form}" if entry.form else "")
            rows.append([name, entry.module, entry.op, what, error, entry.reason])
        lines = _aligned(rows) if self.entries else ["nothing that a rule knows was found"]
        tail = f"{len(self.replaced)} replaced, {len(self.left)} left, {self.others} other modules"
        return "\n".join([*lines, tail])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    cell: Callable[[str, int], str] = str.ljust
    return ["  ".join(map(cell, row, widths)).rstrip() for row in rows]
