"""LPIPS against a direct computation, on random trunks under the public names."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from safetensors.torch import save_file

from data.files import file_digest
from tests.helpers.refusals import refused
from trainer.objectives.parts.lpips import (
    LINEAR_DIGESTS,
    LPIPS,
    Perceptual,
    alex,
    load_linear,
    vgg,
)

# AlexNet's convolutions: index in the trunk -> (output channels, input channels, kernel).
CONVOLUTIONS = {
    0: (64, 3, 11),
    3: (192, 64, 5),
    6: (384, 192, 3),
    8: (256, 384, 3),
    10: (256, 256, 3),
}
# The lpips package's files of linear layers, version 0.1: sha256 of lpips-0.1.4's.
LINEAR_LAYERS = {
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
}
SHIFT = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)


def linear_file(net):
    """Return the file of linear layers that torchmetrics contains."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    return folder / f"{net}.pth"


@pytest.fixture(scope="module")
def tensors():
    """The entries of `lpips.LPIPS(net="alex")`, with a random trunk."""
    generator = torch.Generator().manual_seed(0)
    found = torch.load(linear_file("alex"), map_location="cpu", weights_only=True)
    found["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    for slice_, (index, (out, channels, kernel)) in enumerate(CONVOLUTIONS.items(), 1):
        size = (out, channels, kernel, kernel)
        weight = torch.randn(size, generator=generator) / (channels * kernel**2) ** 0.5
        found[f"net.slice{slice_}.{index}.weight"] = weight
        found[f"net.slice{slice_}.{index}.bias"] = torch.randn(out, generator=generator) / 10
    return found


@pytest.fixture(scope="module")
def torchvision_tensors(tensors):
    """The entries of `torchvision.models.alexnet()`: the same trunk, and a classifier."""
    found = {"classifier.1.weight": torch.zeros(2, 2)}
    for name, value in tensors.items():
        if name.startswith("net"):
            found[f"features.{name.split('.', 2)[2]}"] = value
    return found


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alex.safetensors"
    save_file(tensors, path)
    return path


def direct_distance(tensors, a, b):
    """Return the distance of two images (3, H, W), computed pixel by pixel."""

    def convolve(hidden, i, stride=1, padding=0):
        name = f"net.slice{i}.{list(CONVOLUTIONS)[i - 1]}"
        weight = tensors[f"{name}.weight"].double()
        bias = tensors[f"{name}.bias"].double()
        return F.conv2d(hidden, weight, bias, stride, padding).relu()

    def features(image):
        one = convolve((image - SHIFT) / SCALE, 1, 4, 2)
        two = convolve(F.max_pool2d(one, 3, 2), 2, 1, 2)
        three = convolve(F.max_pool2d(two, 3, 2), 3, 1, 1)
        four = convolve(three, 4, 1, 1)
        five = convolve(four, 5, 1, 1)
        return one, two, three, four, five

    total = 0.0
    for i, (f, g) in enumerate(zip(features(a[None]), features(b[None]))):
        linear = tensors[f"lin{i}.model.1.weight"].double().flatten()
        pixels = [(y, x) for y in range(f.shape[2]) for x in range(f.shape[3])]
        layer = 0.0
        for y, x in pixels:
            u = f[0, :, y, x]
            v = g[0, :, y, x]
            layer += float(linear @ (u / u.norm() - v / v.norm()) ** 2)
        total += layer / len(pixels)
    return total


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 3, 40, 36, generator=generator, dtype=torch.float64) * 2 - 1


def test_it_equals_a_direct_computation(tensors, weights, images):
    a, b = images
    metric = LPIPS(weights).double()
    metric.shift = SHIFT[None]  # not rounded to float32
    metric.scale = SCALE[None]
    distances = [direct_distance(tensors, *pair) for pair in zip(a, b)]
    expected = torch.tensor(distances, dtype=torch.float64)
    torch.testing.assert_close(metric(a, b), expected, rtol=1e-9, atol=1e-12)
    assert expected.min() > 1e-4


@pytest.mark.parametrize("net", LINEAR_LAYERS)
def test_the_linear_layers_are_those_of_the_original_package(net):
    assert file_digest(linear_file(net)) == LINEAR_LAYERS[net]
    channels = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}[net]
    layers = load_linear(net)
    assert [tuple(layer.shape) for layer in layers] == [(1, count, 1, 1) for count in channels]


def test_other_linear_layers_in_torchmetrics_are_refused(monkeypatch):
    monkeypatch.setitem(LINEAR_DIGESTS, "alex", "0")
    with refused("alex.pth", "torchmetrics"):
        load_linear("alex")


def test_it_is_symmetric_and_zero_for_equal_images(weights, images):
    a, b = images.float()
    metric = LPIPS(weights)
    torch.testing.assert_close(metric(a, b), metric(b, a), rtol=0, atol=0)
    assert (metric(a, a) == 0).all()
    assert (metric(a, b) > 0).all()


def test_a_grey_image_is_three_equal_channels(weights, images):
    metric = LPIPS(weights)
    grey = images.float()[0][:, :1]
    colour = grey.expand(-1, 3, -1, -1)
    torch.testing.assert_close(metric(grey, -grey), metric(colour, -colour))


def test_gradients_are_finite_differences(weights, images):
    a, b = images
    metric = LPIPS(weights).double()
    step = torch.randn(a.shape, generator=torch.Generator().manual_seed(2)).double()
    a.requires_grad_(True)
    (slope,) = torch.autograd.grad(metric(a, b).sum(), a)
    numeric = (metric(a + 1e-6 * step, b) - metric(a - 1e-6 * step, b)).sum() / 2e-6
    assert (slope * step).sum().item() == pytest.approx(numeric.item(), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_gradients_are_zero_where_every_feature_is(weights, images):
    a, b = images
    metric = LPIPS(weights).double()
    a.requires_grad_(True)
    for layer in metric.net:
        if hasattr(layer, "bias"):
            layer.bias.fill_(-100.0)  # every feature is zero
    (slope,) = torch.autograd.grad(metric(a, b).sum(), a)
    assert (slope == 0).all()


def test_a_trunk_of_torchvision_alone_gives_the_same_distances(
    torchvision_tensors, weights, images, tmp_path
):
    torch.save(torchvision_tensors, tmp_path / "alexnet.pth")
    save_file(torchvision_tensors, tmp_path / "alexnet.safetensors")
    a, b = images.float()
    for name in ("alexnet.pth", "alexnet.safetensors"):
        assert torch.equal(LPIPS(tmp_path / name)(a, b), LPIPS(weights)(a, b))


@pytest.mark.parametrize(("make", "count"), [(vgg, 14_714_688), (alex, 2_469_696)])
def test_trunks_have_the_public_parameters(make, count):
    """The numbers of parameters are those of torchvision's `features`."""
    with torch.device("meta"):
        trunk, taps = make()
    assert sum(p.numel() for p in trunk.parameters()) == count
    assert all(isinstance(trunk[index], torch.nn.ReLU) for index in taps)
    assert taps[-1] == len(trunk) - 1


def test_the_layers_of_vgg16_have_their_public_indices():
    with torch.device("meta"):
        trunk, taps = vgg()
    found = [index for index, layer in enumerate(trunk) if isinstance(layer, torch.nn.Conv2d)]
    assert found == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert taps == [3, 8, 15, 22, 29]


def test_latents_are_compared_as_images(weights, images):
    """Distances pass through the codec's decoder; only the first argument gets gradients."""
    a, b = images.float()
    perceptual = Perceptual(weights, scale=2.0)
    torch.testing.assert_close(perceptual(a, b), 2 * LPIPS(weights)(a, b))

    # A codec that decodes by tanh.
    perceptual.codec = SimpleNamespace(to=lambda device: SimpleNamespace(decode=torch.tanh))
    x_hat = a.clone().requires_grad_(True)
    x = b.clone().requires_grad_(True)
    found = perceptual(x_hat, x)
    torch.testing.assert_close(found, 2 * LPIPS(weights)(a.tanh(), b.tanh()))
    found.sum().backward()
    assert x_hat.grad.abs().sum() > 0
    assert x.grad is None


def test_a_missing_file_is_refused_with_the_address_of_one(tmp_path):
    with refused("nowhere", "alexnet-owt-7be5be79.pth", kind=FileNotFoundError):
        Perceptual(tmp_path / "nowhere")


def test_files_with_other_contents_are_refused(tensors, weights, tmp_path):
    less = {name: value for name, value in tensors.items() if "slice2" not in name}
    linear = {**tensors, "lin2.model.1.weight": 2 * tensors["lin2.model.1.weight"]}
    cut = {**tensors, "net.slice1.0.weight": tensors["net.slice1.0.weight"][:, :2].contiguous()}
    (tmp_path / "torn").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "torn.pth").write_bytes(linear_file("alex").read_bytes()[:1000])
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file(less, tmp_path / "less")
    save_file(cut, tmp_path / "cut")
    save_file(linear, tmp_path / "linear")
    expected = {
        "torn": ("safetensors",),
        "torn.pth": ("torch.load",),
        "other": ("features.0.weight",),
        "less": ("VGG16", "AlexNet"),
        "cut": ("VGG16", "AlexNet"),
        "linear": ("linear layer 2", "LPIPS 0.1"),
    }
    for name, named in expected.items():
        with refused(tmp_path / name, *named, "vgg16-397923af.pth"):
            LPIPS(tmp_path / name)


@pytest.mark.parametrize("shape", [(2, 40, 40), (3, 30, 40)], ids=["channels", "pixels"])
def test_images_that_the_network_does_not_take_are_refused(weights, shape):
    with refused("LPIPS", shape, 31):
        LPIPS(weights)(torch.zeros(1, *shape), torch.zeros(1, *shape))


def test_a_scale_of_zero_is_refused(weights):
    with refused("Perceptual", "scale", 0):
        Perceptual(weights, scale=0)
