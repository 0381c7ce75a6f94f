"""Which tensor is on which device, checked without a GPU: PyTorch's fake tensors have a device, a shape and no content.

An operator refuses fake tensors of two devices, as CUDA would, and whatever reads a fake tensor fails. Of the tensors
that stay on the CPU, the contents that the model reads are known beforehand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import engine_steps
import pytest
import torch
from engine_steps import mixed_pictures, row
from families import FAMILIES
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rococap.demo import MODEL
from rococap.engines import Options, Prepared, Request, decoding
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.precompute import functions, keeps_grid, tower

GPU = torch.device("cuda:0")


class Sizes:
    """What a model of the Qwen-VL kind reads of the pictures' grids, which stay on the CPU."""

    def __init__(self, pictures: list[Prepared]) -> None:
        grids = torch.cat([picture.inputs.tensors["image_grid_thw"] for picture in pictures])
        self.grids = grids
        patches = grids.prod(-1).tolist()
        self.known = {torch.int32: patches, torch.int64: [n // 4 for n in patches]}
        """Lengths for attention, and for splitting what the tower returns."""
        self.windows: list[int] = []

    def of(self, tensor: Tensor) -> list[int]:
        assert tensor.device.type == "cpu", "read from the device"
        known = self.known[tensor.dtype]
        return known if len(known) == len(tensor) else self.windows


@contextmanager
def known_sizes(model: nn.Module, pictures: list[Prepared], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the model read sizes that it derives from grids on the CPU."""
    if keeps_grid(model):
        sizes, vision = Sizes(pictures), tower(model)
        own = functions(vision)
        lengths = own.get_vision_attention_seqlens(sizes.grids, vision.config)
        patch.setattr(own, "get_vision_attention_seqlens", lambda *args, **kwargs: lengths)
        if hasattr(own, "get_vision_window_index"):
            windows = own.get_vision_window_index(
                sizes.grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            sizes.windows = windows[1].diff().tolist()
            patch.setattr(own, "get_vision_window_index", lambda *args, **kwargs: windows)
        patch.setattr(FakeTensor, "tolist", lambda tensor: sizes.of(tensor))
    yield


def to_gpu(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach()).to(GPU)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if tensors is module._parameters else fake


@pytest.mark.parametrize("family", ["demo", "qwen2_vl", "qwen2_5_vl", "internvl"])
def test_prompts_and_steps_mix_no_tensors_of_two_devices(family, tmp_path, monkeypatch):
    folder = MODEL if family == "demo" else FAMILIES[family](tmp_path)
    engine = engine_steps.loaded(folder, Options(device="cpu", batch_size=8))
    pictures = [engine.prepare(number, Request([image])) for number, image in enumerate(mixed_pictures()[:4])]
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def upload(tensor: Tensor, device: torch.device) -> Tensor:  # without pinned memory, which needs CUDA
        return (tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)).to(device)

    monkeypatch.setattr(decoding, "upload", upload)
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)  # else single numbers are computed for real
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # as the engine sets it on a GPU
    with known_sizes(engine.loaded.model, pictures, monkeypatch), mode:
        to_gpu(engine.loaded.model, mode)
        decoder = ContinuousDecoder(replace(engine.loaded, device=GPU), 8, lambda picture: None)
        assert decoder._prefill([row(picture) for picture in pictures]) == [0, 1, 2, 3]
        for finished in ([], [1, 2], [0]):  # all slots, and then only those that are in use
            decoder._remove(finished)
            for running in decoder._rows.values():
                running.tokens.append(0)
            decoder._step()
        assert decoder._slots.said.device == decoder._slots.layers[0].keys.device == GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_bit_for_bit_a_step_of_the_same_shape():
    engine = engine_steps.loaded(options=Options(device="cuda:0", batch_size=8), max_pixels=50_000)
    decoder = engine.decoder
    assert decoder._graphs
    pictures = [engine.prepare(number, Request([image])) for number, image in enumerate(mixed_pictures()[:6])]
    tokens, keys = [], []
    for replayed in (True, False):
        decoder._prefill([row(picture) for picture in pictures])
        width = decoder._slots.size[1]
        for _ in range(10):
            if replayed:
                assert decoder._graphs.replay(8, width)
            else:
                decoder._decode(8, width)
        tokens.append(decoder._slots.said.tolist())
        keys.append([layer.keys[:6].clone() for layer in decoder._slots.layers])
        decoder._remove(list(decoder._rows))
    assert tokens[0] == tokens[1]
    assert all(torch.equal(one, other) for one, other in zip(*keys, strict=True))
