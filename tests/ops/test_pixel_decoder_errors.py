"""pixel_decoder's complaints name the argument, what was expected and what came, all at once."""

import dataclasses
import importlib

import pytest
import torch
from decoders import Case, op_arguments

from pixnerd_kernels import pixel_decoder, use_backend

CASE = Case()


def call(changes=None, replaced=None, block=None, **options):
    """The op with inputs changed by name, fields of its parameters replaced, or fields of the second block."""
    tensors = {**CASE.inputs(), **(changes or {})}
    params = dataclasses.replace(CASE.params(tensors), **(replaced or {}))
    if block:
        params = dataclasses.replace(
            params, blocks=[params.blocks[0], dataclasses.replace(params.blocks[1], **block)]
        )
    return pixel_decoder(tensors["image"], tensors["hidden"], params, **{"patch_size": 4, **options})


WRONG = {
    "image rank": (
        {"changes": {"image": torch.ones(3, 4, 4)}},
        ValueError,
        r"image: expected \[B, C, H, W\]",
    ),
    "image size": (
        {"changes": {"image": torch.ones(2, 3, 4, 13)}},
        ValueError,
        "image: .*multiples of the patch of 4 x 4 pixels",
    ),
    "tokens": ({"changes": {"hidden": torch.ones(2, 4, 9)}}, ValueError, r"hidden: expected \[2, 3, D\]"),
    "width": ({"changes": {"hidden": torch.ones(2, 3, 8)}}, ValueError, "8 columns, hidden's D"),
    "hidden dtype": (
        {"changes": {"hidden": torch.ones(2, 3, 9).double()}},
        TypeError,
        r"hidden: expected the dtype of image \(torch.float32\)",
    ),
    "params": ({"replaced": {"blocks": []}}, ValueError, "blocks: expected a sequence of at least one"),
    "block": ({"replaced": {"blocks": [3]}}, TypeError, r"blocks\[0\]: expected a DecoderBlockParams"),
    "embedding": (
        {"replaced": {"embed_weight": torch.ones(16, 3 + 5)}},
        ValueError,
        "embed_weight: expected 3 columns for the pixel and 4² for the encoding",
    ),
    "channels": ({"replaced": {"norm_weight": torch.ones(15)}}, ValueError, r"norm_weight: expected \[16\]"),
    "output": (
        {"replaced": {"linear_weight": torch.ones(3, 4)}},
        ValueError,
        r"linear_weight: expected \[C_out, 16\]",
    ),
    "lost bias": (
        {"replaced": {"linear_weight": None}},
        ValueError,
        "linear_bias: expected None where linear_weight is None",
    ),
    "generator rows": (
        {"block": {"generator_weight": torch.ones(33, 9)}},
        ValueError,
        r"blocks\[1\].generator_weight: expected a multiple of 32 rows.*generator_bias: expected \[33\]",
    ),
    "other rows": (
        {"block": {"generator_weight": torch.ones(32, 9), "generator_bias": torch.ones(32)}},
        ValueError,
        r"as many rows as that of blocks\[0\] \(768\)",
    ),
    "one bias": ({"block": {"generator_bias": None}}, ValueError, "biases in all blocks or in none"),
    "generator dtype": (
        {"block": {"generator_weight": torch.ones(768, 9).half()}},
        TypeError,
        r"blocks\[1\].generator_weight: expected the dtype of image",
    ),
    "meta": (
        {"block": {"norm_weight": torch.ones(16, device="meta")}},
        ValueError,
        r"blocks\[1\].norm_weight: expected the device of hidden",
    ),
    "options": (
        {"replaced": {"activation": "tanh", "encoding": "none", "normalize": ("w3",), "norm_eps": -1}},
        ValueError,
        "normalize: .*activation: .*encoding: .*norm_eps: ",
    ),
    "extent": ({"replaced": {"encoding_extent": 16}}, ValueError, "None for every encoding but 'rope'"),
    "patch and workspace": (
        {"patch_size": 0, "workspace": "all", "decoder_scale": (1, -1)},
        ValueError,
        "patch_size: .*decoder_scale: .*workspace: ",
    ),
    "types": (
        {"decoder_scale": 2, "workspace": 1.5, "save_weights": 1},
        TypeError,
        "decoder_scale: expected a pair.*workspace: expected an integer.*save_weights: expected True or False",
    ),
    "no pixels": ({"decoder_scale": (0.1, 1)}, ValueError, "at least one pixel a patch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_problem_is_named(name):
    arguments, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        call(**arguments)


def test_parameters_of_another_kind():
    with pytest.raises(TypeError, match="decoder_params: expected a DecoderParams"):
        pixel_decoder(torch.ones(1, 3, 4, 4), torch.ones(1, 1, 9), {}, patch_size=4)


def test_a_backend_that_cannot_run_says_why():
    with use_backend("triton"), pytest.raises(NotImplementedError, match="pixel_decoder"):
        call()


NAMES = (
    "image", "hidden", "embed_weight", "embed_bias", "generators", "biases", "norms", "final_norm", "linear_weight",
    "linear_bias", "patch",
)  # fmt: skip
#: Arguments of the registered op in place of those of CASE, and words of the complaint.
DIRECT = {
    "image rank": ({"image": torch.ones(3, 4, 12)}, r"image: expected 4 dimensions, got \[3, 4, 12\]"),
    "hidden rank": ({"hidden": torch.ones(6, 9)}, "hidden: expected 3 dimensions"),
    "embedding rank": ({"embed_weight": torch.ones(16)}, "embed_weight: expected 2 dimensions"),
    "generator rank": ({"generators": [torch.ones(768)] * 2}, "generators: expected 2 dimensions"),
    "no generators": ({"generators": []}, "generators, norms, biases do not fit"),
    "generator rows": (
        {"generators": [torch.ones(33, 9)] * 2, "biases": [torch.ones(33)] * 2},
        "pixel_decoder: generators do not fit",
    ),
    "lost weight": (
        {"linear_weight": None},
        r"linear_bias: expected None where linear_weight is None, got \[3\]",
    ),
    "no pixels": (
        {"patch": [0, 4]},
        r"patch: expected two sizes that divide the image's 4 x 12, got \[0, 4\]",
    ),
    "one size": ({"patch": [4]}, r"patch: .* got \[4\]"),
    "pixels left over": ({"image": torch.ones(2, 3, 4, 13)}, "patch: .* the image's 4 x 13"),
}


def direct(changes):
    arguments = op_arguments(CASE, "reference", leaves=False)
    named = dict(zip(NAMES, arguments, strict=False))
    return *{**named, **changes}.values(), *arguments[len(NAMES) :]


@pytest.mark.parametrize("name", DIRECT)
def test_the_registered_op_names_what_does_not_fit(name):
    changes, pattern = DIRECT[name]
    with pytest.raises(ValueError, match=pattern):
        torch.ops.pixnerd.pixel_decoder(*direct(changes))


def test_the_registered_op_names_another_device():
    """Called as for tensors of any device: for meta tensors torch would take the fake."""
    arguments = direct({"embed_bias": torch.ones(16, device="meta")})
    with pytest.raises(ValueError, match=r"devices do not fit the image .* on cpu"):
        importlib.import_module("pixnerd_kernels.ops.pixel_decoder")._forward(*arguments)


WEIGHTS = "saved: expected nothing or the generated weights [2, 6, 768] torch.float32 on cpu, got "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saved": torch.ones(3)}, WEIGHTS + "[3] torch.float32"),
        ({"saved": torch.ones(2, 5, 768)}, WEIGHTS + "[2, 5, 768] torch.float32"),
        ({"saved": torch.ones(2, 6, 768).double()}, WEIGHTS + "[2, 6, 768] torch.float64"),
        ({"needs": [True]}, "needs: expected 13 values, one for each tensor, got 1"),
        (
            {"grad": torch.ones(2, 3, 4, 8)},
            "grad: expected the result's shape, dtype and device, got [2, 3, 4, 8]",
        ),
    ],
    ids=["saved rank", "saved patches", "saved dtype", "needs", "grad"],
)
def test_the_registered_backward_names_what_does_not_fit(changes, message):
    given = {"grad": CASE.upstream(), "saved": torch.empty(0), "needs": [True] * 13, **changes}
    with pytest.raises(ValueError) as caught:
        torch.ops.pixnerd.pixel_decoder_backward(*given.values(), *direct({}))
    assert message in str(caught.value)
