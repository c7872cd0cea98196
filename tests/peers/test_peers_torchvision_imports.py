import pytest
import torch


@pytest.mark.peers
def test_a_timm_model_runs_beside_the_cpu_build_of_torch(timm):
    model = timm.create_model("resnet18", pretrained=False, num_classes=3).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.peers
def test_a_torchvision_model_runs_beside_the_cpu_build_of_torch(torchvision):
    assert torchvision.models.squeezenet1_1(num_classes=3).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)
