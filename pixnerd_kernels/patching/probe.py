"""Runs a module on a small random input, and finds out which of several formulas it computes.

A formula is agreed with when, for the output and every gradient,

    ||out - exact|| <= 2 ||plain - exact|| + 4 eps(dtype) ||exact||

where exact is the formula in float64 on the same tensors, and plain the same in plain PyTorch at the module's dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pixnerd_kernels.checks import FLOATS
from pixnerd_kernels.patching.swap import Replacement

#: A call's arguments by name, in order: tensors, or what is passed on as it is.
Inputs = dict[str, Any]
#: Formulas take tensors and give the output, or the output as "output" and the opaque children's inputs ("attn<").
Formula = Callable[..., Tensor | dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """One thing that a module of a known structure may compute.

    Attributes:
        function: what it computes, in words; forms of the same function differ only in how we run it.
        formula: the function in plain PyTorch at any floating dtype.
        tensors: what the formula takes: names of the call's arguments ("x"), of parameters ("norm.weight"), and of
            children whose result is meant ("generator()").
        replacement: None for functions that we know and do not replace.
        constants: the tensors whose gradient is not compared.
        published: a published model computes it; without a probe, other forms are not considered.
    """

    function: str
    formula: Formula
    tensors: tuple[str, ...]
    replacement: Replacement | None = None
    constants: tuple[str, ...] = ()
    published: bool = True


@dataclass(frozen=True)
class Candidate:
    """A module that has a rule's structure.

    Attributes:
        forms: in order of preference; the first agreeing one of a function is taken.
        inputs: makes the call's arguments by name, for a generator (CPU), in float32.
        children: names of the children whose results the formulas use.
        dtype_from: the parameter whose dtype the probe takes.
        opaque: the children whose results are taken as given, and whose inputs are compared as results.
        settings: attributes of the module's for the time of the probe, in place of its own.
        boundary: an opaque child behind which the formulas begin: what leads to it is the module's own in the
            replacement too, and has to give it the same input.
        method: the method that is called and replaced.
    """

    forms: tuple[Form, ...]
    inputs: Callable[[torch.Generator], Inputs]
    children: tuple[str, ...]
    dtype_from: str
    opaque: tuple[str, ...] = ()
    boundary: str = ""
    method: str = "forward"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The form that was found, or why none was."""

    form: Form | None
    reason: str = ""
    error: float | None = None
    original_error: float | None = None


Results = dict[str, Tensor]


def probe_dtype(module: nn.Module, parameter: str) -> torch.dtype:
    """The dtype that the module computes in: its parameter's, or bfloat16 for storage types such as float8."""
    dtype = module.get_parameter(parameter).dtype
    return dtype if dtype in FLOATS else torch.bfloat16


@contextlib.contextmanager
def _undisturbed(device: torch.device, gradients: bool) -> Iterator[None]:
    """Random states, autocast, grad and inference mode as the probe wants them, and afterwards as they were."""
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if gradients:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind in {"cpu", device.type} & {"cpu", "cuda", "mps", "xpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _watch(module: nn.Module, candidate: Candidate, seen: Results, given: Results) -> Iterator[None]:
    """Collect the children's results ("name()") while the module runs, and for opaque ones the inputs ("name<").

    The graph is cut behind an opaque child, so that gradients are those of what stands around it; what it gave
    before (`given`) it gives again.
    """

    def record(name: str) -> Callable:
        def hook(child: nn.Module, args: tuple, result: Any) -> Any:
            if name in candidate.opaque or name == candidate.boundary:
                seen[f"{name}<"] = args[0]
                result = given.get(f"{name}()", result).detach().requires_grad_(torch.is_grad_enabled())
            seen[f"{name}()"] = result
            return result

        return hook

    names = (*candidate.children, *candidate.opaque, *([candidate.boundary] if candidate.boundary else []))
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_hook(record(name)).remove)
        yield


def _gradients(results: Results, leaves: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> Results:
    """Gradients of the sum of results weighted by `upstream`; zeros where nothing flows."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    weighted = [(results[name] * weight.to(results[name].dtype)).sum() for name, weight in upstream.items()]
    total = torch.stack([w.double() for w in weighted]).sum()
    if not wanted or not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(total, list(wanted.values()), retain_graph=True, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True)
    }


@dataclass
class _Run:
    """What one call of a method gave: results by name, and every tensor that a formula may take."""

    results: Results
    tensors: Results

    def with_gradients(self, form: Form, upstream: Results) -> Results:
        leaves = {name: self.tensors[name] for name in form.tensors if name not in form.constants}
        return {**self.results, **_gradients(self.results, leaves, upstream)}

    def reached(self, inputs: Inputs) -> set[str]:
        """The inputs that gradients flow back to."""
        wanted = {
            name: tensor
            for name, tensor in inputs.items()
            if isinstance(tensor, Tensor) and tensor.requires_grad
        }
        total = torch.stack([r.double().sum() for r in self.results.values()]).sum()
        gradients = torch.autograd.grad(total, list(wanted.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}


def _call(
    module: nn.Module, candidate: Candidate, inputs: Inputs, call: Callable, given: Results | None = None
) -> _Run:
    seen: Results = {}
    device = next(module.parameters()).device
    # The same random numbers in every call: an adapter inside may drop some of its input.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _watch(module, candidate, seen, given or {}),
    ):
        out = call(module, *inputs.values())
    tensors = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
    results = {
        "output": out,
        **{f"{name}<": seen[f"{name}<"] for name in candidate.opaque if f"{name}<" in seen},
    }
    return _Run(results, {**dict(module.named_parameters()), **tensors, **seen})


def _formula(
    form: Form, tensors: Results, dtype: torch.dtype, upstream: Results, grad_of: set[str]
) -> Results:
    """The formula and its gradients at a dtype, on the same values."""
    leaves = {
        name: _cast(tensors[name].detach(), dtype).requires_grad_(f"gradient of {name}" in grad_of)
        for name in form.tensors
    }
    results = form.formula(*leaves.values())
    results = results if isinstance(results, dict) else {"output": results}
    return {**results, **_gradients(results, leaves, upstream)} if grad_of else results


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To a floating dtype, or its complex counterpart (of float32 for the half types)."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def _worst(results: Results, plain: Results, exact: Results) -> tuple[float, str]:
    """The largest error as a fraction of its limit, and whose it is; infinite for NaN or another shape."""
    worst, where = 0.0, ""
    for name, truth in exact.items():
        out = results.get(name)
        if out is None or out.shape != truth.shape:
            return math.inf, name
        limit = 2 * _norm(plain[name].double() - truth) + 4 * torch.finfo(out.dtype).eps * _norm(truth)
        error = _norm(out.double() - truth)
        fraction = error / limit if limit > 0 else (0.0 if error == 0 else math.inf)
        if not fraction <= worst:
            worst, where = (math.inf if math.isnan(fraction) else fraction), name
    return worst, where


def _compare(
    form: Form, original: _Run, own: Results, dtype: torch.dtype, upstream: Results
) -> tuple[Results, float]:
    """The formula in float64 with the gradients that `own` has, and `own`'s worst error as a fraction of its limit."""
    grad_of = {name for name in own if name.startswith("gradient")}
    exact = _formula(form, original.tensors, torch.float64, upstream, grad_of)
    plain = _formula(form, original.tensors, dtype, upstream, grad_of)
    return exact, _worst(own, plain, exact)[0]


def _relative(results: Results, exact: Results) -> float:
    """The largest relative error of a result, gradients apart."""
    return max(
        _norm(results[name].double() - truth) / (_norm(truth) or 1.0)
        for name, truth in exact.items()
        if not name.startswith("gradient")
    )


def _same(ours: Results, theirs: Results, name: str) -> bool:
    """Equal but for the order of additions: the same modules made it."""
    if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
        return False
    return _norm(ours[name].double() - theirs[name].double()) <= 4 * torch.finfo(
        theirs[name].dtype
    ).eps * _norm(theirs[name])


def verify(module: nn.Module, candidate: Candidate) -> Verdict:
    """Find the form that the module computes, and check our replacement of it, on one random probe.

    The probe has the module's dtype and device and runs in its train or eval mode, and then in the other, where it may
    drop something. Nothing of the caller's is disturbed: modes, random states, gradients (none are accumulated), grad
    mode and autocast.
    """
    parameter = module.get_parameter(candidate.dtype_from)
    dtype, device = probe_dtype(module, candidate.dtype_from), parameter.device
    gradients = not any(p.is_inference() for p in module.parameters())
    generator = torch.Generator().manual_seed(20251)
    with _undisturbed(device, gradients):
        with torch.device("cpu"):  # the generator's, whatever the default device
            made = candidate.inputs(generator)
        inputs: Inputs = {
            name: _cast(value.to(device), dtype) if isinstance(value, Tensor) else value
            for name, value in made.items()
        }
        for tensor in inputs.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_(gradients)
        with _set(module, candidate.settings):
            verdict = _tried(module, candidate, inputs, generator)
            if verdict.form is None:
                return verdict
            known = replace(candidate, forms=(verdict.form,))
            with _other_mode(module) as mode:
                other = _tried(module, known, inputs, generator)
        if other.form is None:
            return replace(other, reason=f"in {mode} mode {other.reason}")
        return verdict


def _tried(module: nn.Module, candidate: Candidate, inputs: Inputs, generator: torch.Generator) -> Verdict:
    try:
        return _judge(module, candidate, inputs, generator)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return Verdict(None, f"it raised on the probe: {type(error).__name__}: {first}")


@contextlib.contextmanager
def _set(module: nn.Module, settings: Mapping[str, Any]) -> Iterator[None]:
    """The module with these values of its own attributes, and afterwards as it was."""
    before = {name: getattr(module, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _other_mode(module: nn.Module) -> Iterator[str]:
    """Training where the module is in eval mode, eval where it is in training, and every submodule's own again."""
    modes = [(each, each.training) for each in module.modules()]
    training = not module.training
    try:
        for each, _ in modes:
            each.training = training
        yield "training" if training else "eval"
    finally:
        for each, mode in modes:
            each.training = mode


def _judge(module: nn.Module, candidate: Candidate, inputs: Inputs, generator: torch.Generator) -> Verdict:
    original = _call(module, candidate, inputs, getattr(type(module), candidate.method))
    out = original.results["output"]
    if not isinstance(out, Tensor):
        return Verdict(None, f"it returns {type(out).__name__}, expected a tensor")
    if torch.is_grad_enabled() and not out.requires_grad:
        return Verdict(None, "its result has no gradient, where the op's would have one")
    upstream = {
        name: torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype)
        for name, tensor in original.results.items()
    }
    agreed: dict[str, tuple[Form, Results, Results]] = {}
    closest = (math.inf, "no form")
    for form in candidate.forms:
        if form.function in agreed:
            continue
        if missing := [name for name in form.tensors if name not in original.tensors]:
            closest = min(closest, (math.inf, f"{form.function} (its {', '.join(missing)} did not run)"))
            continue
        exact, fraction = _compare(form, original, original.results, out.dtype, upstream)
        if fraction <= 1:  # gradients cost more than the output, and most forms are out without them
            own = original.with_gradients(form, upstream)
            exact, fraction = _compare(form, original, own, out.dtype, upstream)
            if fraction <= 1:
                agreed[form.function] = (form, own, exact)
                continue
        if all(
            name in original.results and original.results[name].shape == t.shape for name, t in exact.items()
        ):
            closest = min(closest, (_relative(original.results, exact), form.function))
    if not agreed:
        return Verdict(
            None, f"it computes no known form (the closest, {closest[1]}, is off by {closest[0]:.1e})"
        )
    if len(agreed) > 1:
        names = " and ".join(agreed)
        return Verdict(None, f"the probe cannot tell {names} apart: zero-initialised or degenerate weights")
    form, own, exact = next(iter(agreed.values()))
    if form.replacement is None:
        return Verdict(None, f"it has {form.function}, which is not replaced")
    replaced = _call(module, candidate, inputs, form.replacement.run, original.tensors)
    ours = replaced.with_gradients(form, upstream)
    fraction, where = _worst(ours, own, exact)
    if torch.is_grad_enabled() and (stopped := replaced.reached(inputs) ^ original.reached(inputs)):
        return Verdict(None, f"it stops the gradient of {', '.join(sorted(stopped))}")
    if candidate.boundary and not _same(replaced.tensors, original.tensors, f"{candidate.boundary}<"):
        return Verdict(None, f"what leads to its {candidate.boundary} is not what is known")
    if ours["output"].dtype != out.dtype:
        return Verdict(None, f"the replacement gives {ours['output'].dtype}, the module {out.dtype}")
    if not fraction <= 1:
        return Verdict(None, f"the replacement's {where} misses the tolerance by a factor of {fraction:.2g}")
    remark = "" if any(name.startswith("gradient") for name in own) else "no gradients to compare"
    return Verdict(form, remark, _relative(ours, exact), _relative(own, exact))
