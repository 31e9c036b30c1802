"""Patched models under the derivatives of every kind: those of the models' own code."""

import copy

import foreign
import pytest
import torch
from derivatives import KINDS, assert_derivatives
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import pixnerd_kernels as pk

IMAGE = (2, 3, 16, 24)
MODELS = {
    "c2i": (foreign.PixNerDiT, {"x": IMAGE, "t": (2,)}, {"y": torch.tensor([1, 2])}),
    "t2i": (foreign.TextPixNerDiT, {"x": IMAGE, "t": (2,), "y": (2, 7, 24)}, {}),
    "radiance": (lambda: foreign.ChromaRadiance(24, 16, 2, 2, 8, "conv"), {"image": IMAGE, "hidden": (2, 6, 24)}, {}),
}  # fmt: skip


#: A model's third gradients are all rounding, and PyTorch's own layers have no tangents of gradients.
LEFT_OUT = ("third_gradients", "tangents_of_gradients", "tangents_of_own_gradients")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LEFT_OUT])
@pytest.mark.parametrize("model", MODELS)
def test_derivatives(model, kind):
    """With respect to inputs and parameters; these are tensors of the call then, and no nn.Parameters.

    The models' own tables of positions and frequencies are rounded to float32.
    """
    torch.manual_seed(0)
    make, shapes, others = MODELS[model]
    own = make()
    patched = copy.deepcopy(own)
    tensors = {
        name: torch.rand(shape) if name == "t" else torch.randn(shape) for name, shape in shapes.items()
    }
    for name, parameter in own.named_parameters():
        tensors[name] = parameter.detach() + 0.1 * torch.randn_like(parameter)
    assert pk.patch(patched).replaced

    def function(module):
        def call(**tensors):
            inputs = {name: tensors.pop(name) for name in shapes}
            if model == "radiance":  # its embedder computes in a dtype of its own
                module.nerf_image_embedder.dtype = inputs["image"].dtype
            # As their own code: what torch's flash kernels cannot, its formula can.
            with sdpa_kernel(SDPBackend.MATH):
                return (functional_call(module, tensors, (), inputs | others),)

        return call

    assert_derivatives(kind, function(patched), function(own), tensors, relative=1e-5)
