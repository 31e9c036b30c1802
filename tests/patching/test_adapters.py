"""The three adapters, and their examples as they are run."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import foreign
import pytest
import recorded
import torch
from torch import nn

import pixnerd_kernels as pk
from pixnerd_kernels.patching import adapters
from pixnerd_kernels.patching.adapters.comfyui import example as comfyui_example
from pixnerd_kernels.patching.adapters.comfyui.pixnerd_radiance import NODE_CLASS_MAPPINGS, estimate
from pixnerd_kernels.patching.adapters.diffusers import example as diffusers_example
from pixnerd_kernels.patching.adapters.diffusers import patch_pipeline
from pixnerd_kernels.patching.adapters.official import PatchPixNerd
from pixnerd_kernels.patching.adapters.official import example as official_example

FOLDER = Path(adapters.__path__[0])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Folders that import like the real ones, with the stand-ins in them."""
    files = {
        "src/models/transformer/pixnerd_c2i.py": "from foreign import PixNerDiT\n",
        "src/diffusers/models/transformers/transformer_pixnerd.py": (
            "import torch, foreign\n"
            "class PixNerdTransformer2DModel(torch.nn.Module):\n"
            "    def __init__(self, use_ema, **options):\n"
            "        super().__init__()\n"
            "        self.denoiser = foreign.PixNerDiT(**options)\n"
            "    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):\n"
            "        return (self.denoiser(sample, timestep, encoder_hidden_states),)\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_callback_patches_before_compilation_and_takes_it_back():
    module = SimpleNamespace(denoiser=recorded.model("c2i_tiny"), ema_denoiser=recorded.model("c2i_tiny"))
    callback = PatchPixNerd()
    callback.setup(SimpleNamespace(is_global_zero=False), module, "fit")
    callback.setup(SimpleNamespace(), module, "validate")
    assert not callback.reports["denoiser"].left
    assert not callback.reports["ema_denoiser"].left
    assert recorded.disagreements(module.denoiser, "c2i_tiny") == {}
    callback.teardown(SimpleNamespace(), module, "fit")
    assert type(module.denoiser.blocks[2]) is foreign.NerfBlock
    with pytest.raises(ValueError, match="SimpleNamespace has no teacher"):
        PatchPixNerd(models=["denoiser", "teacher"]).setup(SimpleNamespace(), module, "fit")


def test_a_pipeline_s_transformer_is_patched():
    transformer = recorded.model("c2i_tiny")
    report = patch_pipeline(SimpleNamespace(transformer=transformer), ops="neural_field_mlp_packed")
    assert [entry.name for entry in report.replaced] == ["blocks.2", "blocks.3"]
    with pytest.raises(TypeError, match="expected one with a transformer, got SimpleNamespace"):
        patch_pipeline(SimpleNamespace(transformer=None))


def test_examples(checkout, capsys):
    official_example.main([str(checkout), "--steps", "2"])
    out = capsys.readouterr().out
    assert "step 1: loss" in out
    assert "replaced: w1, w2 normalised" in out
    diffusers_example.main([str(checkout)])
    out = capsys.readouterr().out
    assert float(out.rsplit(" ", 1)[1]) < 1e-4


def test_the_comfyui_example_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", comfyui_example.__name__],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "loaded: forward_nerf is pixel_decoder" in done.stdout
    assert done.stdout.rstrip().endswith("unloaded: 0.0e+00")


@pytest.fixture
def comfy(monkeypatch):
    extension = ModuleType("comfy.patcher_extension")
    extension.PatcherInjection = SimpleNamespace
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


def test_the_node_patches_while_the_model_is_loaded(comfy):
    model, node = (
        recorded.model("radiance_head_conv"),
        NODE_CLASS_MAPPINGS["PixnerdPatchChromaRadianceHead"](),
    )
    given = comfyui_example.ModelPatcher(SimpleNamespace(diffusion_model=model))
    patched, text = node.patch(given, True, 1024, 512, 2)
    assert text.startswith("1024x512, batch 2: the head takes about")
    assert type(model) is foreign.ChromaRadiance
    for _ in range(2):
        patched.load()
        assert pk.patch(model, ops="pixel_decoder").entries[0].reason.startswith("it is already patched")
        assert recorded.disagreements(model, "radiance_head_conv") == {}
        patched.unload()
        assert type(model) is foreign.ChromaRadiance
    assert not given.injections
    assert not node.patch(patched, False, 64, 64, 1)[0].injections
    with pytest.raises(ValueError, match="expected a Chroma Radiance model, got Linear"):
        node.patch(
            comfyui_example.ModelPatcher(SimpleNamespace(diffusion_model=nn.Linear(1, 1))), True, 16, 16, 1
        )


@pytest.mark.parametrize(("channels", "patch", "tile"), [(16, 8, 16), (32, 16, 16), (32, 16, 0), (16, 16, 4)])
def test_the_estimate_is_what_is_measured(channels, patch, tile):
    """To a quarter before the patch; after it, as an upper bound, the coordinate tables apart."""
    sys.path.append(str(Path(__file__).parents[2]))
    from benchmarks.memory import allocation_peak

    torch.manual_seed(0)
    model = foreign.ChromaRadiance(32, channels, 4, 2, patch, "conv", nerf_tile_size=tile)
    model.nerf_final_layer_conv.forward = lambda x: x  # both have it in common
    image, hidden = torch.randn(1, 3, 8 * patch, 8 * patch), torch.randn(1, 64, 32)
    before, after = estimate(
        8 * patch, 8 * patch, 1, channels=channels, hidden=4 * channels, patch=patch, tile=tile, itemsize=4
    )
    with torch.inference_mode():
        measured = allocation_peak(lambda: (model(image, hidden),)).peak
        assert 0.75 * before < measured < 1.25 * before
        assert pk.patch(model, ops="pixel_decoder").replaced
        assert allocation_peak(lambda: (model(image, hidden),)).peak <= after + (1 << 20)


def test_the_folder_for_comfyui_needs_nothing_beside_it():
    """It is copied alone, and looked at without ComfyUI."""
    folder = FOLDER / "comfyui" / "pixnerd_radiance"
    assert [path.name for path in folder.iterdir() if path.suffix == ".py"] == ["__init__.py"]
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('node', r'%s');"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(*m.NODE_DISPLAY_NAME_MAPPINGS.values())"
    )
    path = folder / "__init__.py"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code % path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "Patch Chroma Radiance head"


@pytest.mark.parametrize("name", ["official", "diffusers", "comfyui"])
def test_every_adapter_has_a_page_whose_commands_exist(name):
    page = (FOLDER / name / "README.md").read_text()
    assert f"python -m pixnerd_kernels.patching.adapters.{name}.example" in page
    assert (FOLDER / name / "example.py").exists()
