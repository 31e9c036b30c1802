"""`patch`: our ops inside a foreign model, verified on the spot."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.patching.probe import Candidate, Verdict, verify
from pixnerd_kernels.patching.refusals import flattened, refusal
from pixnerd_kernels.patching.report import Entry, Report
from pixnerd_kernels.patching.rules import RULES, Left, Rule
from pixnerd_kernels.patching.swap import Replacement, swap


def patch(
    model: nn.Module, *, ops: str | Sequence[str] = "all", verify: bool = True, dry_run: bool = False
) -> Report:
    """Put this library's ops into a model in place; parameters, `state_dict` and hooks stay as they are.

    Modules are recognised by structure (attributes and parameter shapes), whatever their class is called, and each is
    run on a small random probe of its own dtype and device, without disturbing random states, gradients or modes. What
    it computes is compared with the known forms in float64, output and gradients, and so is the replacement:
    ||out - exact|| <= 2 ||plain - exact|| + 4 eps ||exact||. A module that agrees with no form, or with several, is
    left alone.

    Args:
        model: patched in place, at any depth: inside wrappers such as DistributedDataParallel, too.
        ops: "all", or names of ops to put in.
        verify: without it, only modules whose structure has one known form are replaced, untested.
        dry_run: change nothing; the report says what would be done.

    Returns:
        A `Report`: a table when printed, plain values from `data()`, and `unpatch()` for exactly the old model. The
        model is changed after everything is checked, or not at all. Patching twice is harmless: the second report
        says that the modules are patched. A copy or a pickle of a patched model is patched too.

    Raises:
        TypeError, ValueError: every problem with the arguments at once; an unknown op lists the known ones.
    """
    rules = _rules(model, ops, verify, dry_run)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    sharded = {child for wrapper in flattened(model) for child in wrapper.modules()}
    entries: list[Entry] = []
    chosen: list[tuple[str, nn.Module, Replacement]] = []
    for module, paths in names.items():
        for rule in rules:
            match = _match(rule, module)
            if match is None:
                continue
            verdict = _verdict(module, match, verify, module in sharded)
            entries.append(_entry(rule, module, paths, verdict, dry_run))
            if verdict.form is not None:
                assert verdict.form.replacement is not None
                chosen.append((paths[0], module, verdict.form.replacement))
            break
    if not dry_run:
        for _, module, replacement in chosen:
            swap(module, replacement)
    return Report(entries, len(names) - len(entries), [] if dry_run else chosen)


def _rules(model: object, ops: object, verify: object, dry_run: object) -> list[Rule]:
    problems = Problems("patch")
    if not isinstance(model, nn.Module):
        problems.add_type("model", "a torch.nn.Module", model)
    known = list(dict.fromkeys(rule.op for rule in RULES))
    wanted = known if ops == "all" else [ops] if isinstance(ops, str) else ops
    if not isinstance(wanted, Sequence):
        problems.add_type("ops", '"all" or a sequence of names', ops)
        wanted = []
    for name in wanted:
        problems.choice("ops", name, ["all", *known])
    for argument, value in (("verify", verify), ("dry_run", dry_run)):
        if not isinstance(value, bool):
            problems.add_type(argument, "True or False", value)
    problems.raise_if_any()
    return [rule for rule in RULES if rule.op in wanted]


def _match(rule: Rule, module: nn.Module) -> Candidate | Left | None:
    """A foreign module may raise at the mere look at an attribute: that leaves it, and the others go on."""
    try:
        return rule.match(module)
    except Exception as error:
        return Left(f"looking at it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _verdict(module: nn.Module, match: Candidate | Left, check: bool, sharded: bool) -> Verdict:
    if reason := refusal(module, match.method if isinstance(match, Candidate) else "forward"):
        return Verdict(None, reason)
    if sharded:
        return Verdict(None, "it is inside FullyShardedDataParallel: patch before wrapping")
    if isinstance(match, Left):
        return Verdict(None, match.reason)
    if check:
        return verify(module, match)
    functions = {form.function: form for form in reversed(match.forms) if form.replacement and form.published}
    if len(functions) == 1:
        return Verdict(next(iter(functions.values())), "not verified")
    return Verdict(None, f"verify=False, and its structure has several forms: {'; '.join(functions)}")


def _entry(rule: Rule, module: nn.Module, paths: list[str], verdict: Verdict, dry_run: bool) -> Entry:
    status = "left" if verdict.form is None else "would replace" if dry_run else "replaced"
    return Entry(
        name=paths[0],
        module=type(module).__name__,
        op=rule.op,
        status=status,
        form=verdict.form.function if verdict.form else "",
        error=verdict.error,
        original_error=verdict.original_error,
        reason=verdict.reason,
        also=tuple(paths[1:]),
    )
