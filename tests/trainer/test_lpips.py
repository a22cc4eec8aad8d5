"""LPIPS against a computation by hand, with random weights of the public layout."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from trainer.lpips import LPIPS, Perceptual, alex, vgg

PLACES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}  # AlexNet's convolutions


@pytest.fixture(scope="module")
def tensors():
    """Random weights under the names of lpips.LPIPS(net="alex"), with what else is in its state."""
    generator = torch.Generator().manual_seed(0)
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for slice_, (place, (out, channels, kernel)) in enumerate(PLACES.items(), 1):
        size = (out, channels, kernel, kernel)
        found[f"net.slice{slice_}.{place}.weight"] = torch.randn(size, generator=generator) / (channels * kernel**2) ** 0.5
        found[f"net.slice{slice_}.{place}.bias"] = torch.randn(out, generator=generator) / 10
        found[f"lin{slice_ - 1}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return found


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(tensors, path)
    return path


def by_hand(tensors, a, b):
    def convolve(hidden, i, stride=1, padding=0):
        name = f"net.slice{i}.{list(PLACES)[i - 1]}"
        return F.conv2d(hidden, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double(), stride, padding).relu()

    def features(image):
        one = convolve((image - SHIFT) / SCALE, 1, 4, 2)
        two = convolve(F.max_pool2d(one, 3, 2), 2, 1, 2)
        three = convolve(F.max_pool2d(two, 3, 2), 3, 1, 1)
        four = convolve(three, 4, 1, 1)
        return one, two, three, four, convolve(four, 5, 1, 1)

    total = 0.0
    for i, (f, g) in enumerate(zip(features(a[None]), features(b[None]))):
        linear = tensors[f"lin{i}.model.1.weight"].double().flatten()
        cells = [(f[0, :, y, x], g[0, :, y, x]) for y in range(f.shape[2]) for x in range(f.shape[3])]
        total += sum(float(linear @ (u / u.norm() - v / v.norm()) ** 2) for u, v in cells) / len(cells)
    return total


SHIFT = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)


@pytest.fixture
def images():
    return torch.rand(2, 3, 3, 40, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def test_it_is_what_is_computed_by_hand(tensors, weights, images):
    a, b = images
    metric = LPIPS(weights).double()
    metric.shift, metric.scale = SHIFT[None], SCALE[None]  # not rounded to float32
    expected = torch.tensor([by_hand(tensors, *pair) for pair in zip(a, b)], dtype=torch.float64)
    torch.testing.assert_close(metric(a, b), expected, rtol=1e-9, atol=1e-12)
    assert expected.min() > 1e-3


def test_it_is_symmetric_and_zero_for_equal_images(weights, images):
    a, b = images.float()
    metric = LPIPS(weights)
    torch.testing.assert_close(metric(a, b), metric(b, a), rtol=0, atol=0)
    assert (metric(a, a) == 0).all() and (metric(a, b) > 0).all()
    grey = a[:, :1]
    torch.testing.assert_close(metric(grey, -grey), metric(grey.expand(-1, 3, -1, -1), -grey.expand(-1, 3, -1, -1)))


def test_gradients_are_finite_differences_and_finite_where_features_vanish(weights, images):
    a, b = images
    metric, step = LPIPS(weights).double(), torch.randn(a.shape, generator=torch.Generator().manual_seed(2)).double()
    a.requires_grad_(True)
    (slope,) = torch.autograd.grad(metric(a, b).sum(), a)
    numeric = (metric(a + 1e-6 * step, b) - metric(a - 1e-6 * step, b)).sum() / 2e-6
    assert (slope * step).sum().item() == pytest.approx(numeric.item(), rel=1e-4)
    for layer in metric.net:
        if hasattr(layer, "bias"):
            layer.bias.fill_(-100.0)  # every feature is zero
    (slope,) = torch.autograd.grad(metric(a, b).sum(), a)
    assert (slope == 0).all()
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_names_of_torchvision_and_of_either_linear_layer_are_read(tensors, weights, images, tmp_path):
    names = {
        name: f"features.{name.split('.', 2)[2]}" if name.startswith("net") else name.replace("lin", "lins.") for name in tensors
    }
    save_file({names[name]: value for name, value in tensors.items()}, tmp_path / "other.safetensors")
    a, b = images.float()
    assert torch.equal(LPIPS(tmp_path / "other.safetensors")(a, b), LPIPS(weights)(a, b))


def test_trunks_are_the_public_ones():
    """Parameters of torchvision's `features`: 14,714,688 and 2,469,696; the first places of VGG16's blocks."""
    for make, count in ((vgg, 14_714_688), (alex, 2_469_696)):
        with torch.device("meta"):
            trunk, taps = make()
        assert sum(p.numel() for p in trunk.parameters()) == count
        assert all(isinstance(trunk[place], torch.nn.ReLU) for place in taps) and taps[-1] == len(trunk) - 1
    with torch.device("meta"):
        trunk, taps = vgg()
    convolutions = [place for place, layer in enumerate(trunk) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28] and taps == [3, 8, 15, 22, 29]


def test_latents_are_compared_as_images(weights, images):
    """Through the codec, with gradients of the first argument alone."""
    a, b = images.float()
    perceptual = Perceptual(weights, scale=2.0)
    torch.testing.assert_close(perceptual(a, b), 2 * LPIPS(weights)(a, b))
    perceptual.codec = SimpleNamespace(to=lambda device: SimpleNamespace(decode=torch.tanh))
    x_hat, x = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    found = perceptual(x_hat, x)
    torch.testing.assert_close(found, 2 * LPIPS(weights)(a.tanh(), b.tanh()))
    found.sum().backward()
    assert x_hat.grad.abs().sum() > 0 and x.grad is None


def test_bad_files_and_images_are_named(tensors, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file; LPIPS needs its weights: make it once"):
        Perceptual(tmp_path / "nowhere")
    (tmp_path / "torn").write_bytes(weights.read_bytes()[:1000])
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file({name: value for name, value in tensors.items() if "lin2" not in name}, tmp_path / "less")
    cut = {name: value[:, :2].contiguous() if name == "net.slice1.0.weight" else value for name, value in tensors.items()}
    save_file(cut, tmp_path / "cut")
    said = {"torn": "not a readable", "other": "no trunk", "less": "not the weights", "cut": "not the weights"}
    for name, words in said.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}") as refused:
            LPIPS(tmp_path / name)
        assert "\n" not in str(refused.value)
    for shape in ((2, 40, 40), (3, 30, 40)):
        with pytest.raises(ValueError, match=r"LPIPS: images are .*31 pixels"):
            LPIPS(weights)(torch.zeros(1, *shape), torch.zeros(1, *shape))
    with pytest.raises(ValueError, match="Perceptual: scale is 0"):
        Perceptual(weights, scale=0)
