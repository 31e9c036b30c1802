"""Stand-ins with the recorded weights, and the comparison with what was recorded."""

import foreign
import torch
from golden import load
from tolerance import relative

MODELS = {
    "c2i_tiny": foreign.PixNerDiT,
    "c2i_d64_p16": foreign.PixNerDiT,
    "t2i_tiny": foreign.TextPixNerDiT,
    "t2i_heavydecoder_scaled": foreign.HeavyPixNerDiT,
    "radiance_head_conv": foreign.ChromaRadiance,
    "radiance_head_linear": foreign.ChromaRadiance,
}


def model(name):
    """The stand-in with the recorded weights."""
    config, golden = load(name)
    config = {key: value for key, value in config.items() if key not in ("batch", "grid")}
    made = MODELS[name](**config)
    if name == "t2i_heavydecoder_scaled":
        made.decoder_patch_scaling_h, made.decoder_patch_scaling_w = 2.0, 1.5
    prefix = "param."
    made.load_state_dict({k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)})
    return made


def inputs(name):
    """The recorded inputs; the differentiable ones are leaves."""
    _, golden = load(name)
    names = ("image", "hidden") if name.startswith("radiance") else ("x", "t", "y")
    return {key: golden[f"input.{key}"].clone().requires_grad_(f"grad.{key}" in golden) for key in names}


def disagreements(made, name):
    """What differs from the recording: the output by more than 1e-4, a gradient by more than 1e-3."""
    _, golden = load(name)
    given = inputs(name)
    made.zero_grad()
    out = made(*given.values())
    out.backward(golden["grad_output"])
    errors = {"output": (relative(out.detach(), golden["output"]), 1e-4)}
    for key, tensor in {**{f"grad.{k}": v.grad for k, v in given.items()}}.items():
        if key in golden:
            errors[key] = (relative(tensor, golden[key]), 1e-3)
    for key, parameter in made.named_parameters():
        recorded = golden[f"grad.param.{key}"]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        errors[f"grad.param.{key}"] = (relative(grad, recorded), 1e-3)
    return {key: error for key, (error, limit) in errors.items() if not error <= limit}
