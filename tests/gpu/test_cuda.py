"""What needs a CUDA device: mixed precision and the attention kernels."""

import pytest
import torch
import torch.nn.functional as F

from models.nets.attention import Attention, xformers_kernel

pytestmark = pytest.mark.gpu


def test_attention_in_bf16_is_near_float32():
    layer, tokens = Attention(64, 4).cuda(), torch.randn(2, 64, 64, device="cuda")
    exact = layer(tokens)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(layer(tokens).float(), exact, rtol=5e-2, atol=5e-2)


def test_xformers_agrees_with_torch():
    kernel = xformers_kernel("cuda", torch.bfloat16)
    if kernel is None:
        pytest.skip("xformers has no CUDA kernel here")
    q, k, v = torch.randn(3, 2, 64, 4, 16, device="cuda", dtype=torch.bfloat16)
    ours = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(kernel(q, k, v), ours, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_a_device(workspace, tmp_path, precision):
    settings = ("--trainer.max_steps", "3", "--trainer.precision", precision, "--trainer.accelerator", "cuda")
    workspace.rectify("fit", "--config", "configs/digits/teacher.yaml", "--out", tmp_path / "run", *settings)
    assert (tmp_path / "run" / "checkpoints" / "step=000000003.ckpt").exists()
