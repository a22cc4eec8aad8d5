"""What needs a CUDA device: mixed precision and the attention kernels."""

import pytest
import torch
import torch.nn.functional as F

from models.nets.attention import Attention, xformers_kernel
from tests.helpers.training import config_words, study_config

pytestmark = pytest.mark.gpu


def test_attention_in_bfloat16_is_near_float32():
    layer = Attention(64, 4).cuda()
    tokens = torch.randn(2, 64, 64, device="cuda")
    expected = layer(tokens)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(layer(tokens).float(), expected, rtol=5e-2, atol=5e-2)


def test_xformers_matches_torch():
    kernel = xformers_kernel("cuda", torch.bfloat16)
    if kernel is None:
        pytest.skip("xformers has no kernel for this device")
    q, k, v = torch.randn(3, 2, 64, 4, 16, device="cuda", dtype=torch.bfloat16)
    heads_first = (part.transpose(1, 2) for part in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    torch.testing.assert_close(kernel(q, k, v), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_a_device(workspace, tmp_path, precision):
    workspace.rectify(
        *("fit", *config_words(study_config("digits", "teacher")), "--out", tmp_path / "run"),
        *("--trainer.max_steps", "3", "--trainer.precision", precision),
        *("--trainer.accelerator", "cuda"),
    )
    assert (tmp_path / "run" / "checkpoints" / "step=000000003.ckpt").exists()
