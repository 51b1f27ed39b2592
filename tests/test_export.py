"Networks of several families become model files that answer as they do, for any number of photos."
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn
from plant_mlops.model.backbone import build_backbone
from plant_mlops.model.export import check_export, embedding_bank, export_onnx
from plant_mlops.registry.model_file import check_model_file, run_model

@pytest.mark.parametrize('arch', ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'squeezenet1_1'])
def test_the_exported_file_gives_the_outputs_of_the_network(arch, tmp_path):
    "A residual network, a transformer, one with layer norm, and one of torchvision's."
    torch.manual_seed(0)
    backbone = build_backbone(arch, pretrained=False, size=64)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(backbone.d, 3))
    net = nn.Sequential(backbone, head)
    trained = SimpleNamespace(
        net=net, mean=backbone.mean, std=backbone.std, image_size=64, classes=['clover', 'daisy', 'grass'], arch=arch,
        embeddings=torch.rand(30, backbone.d))
    path = export_onnx(trained, tmp_path/'model.onnx')
    largest = check_export(path, trained, bank=embedding_bank(trained.embeddings))
    assert set(largest) == {'probabilities', 'logits', 'embedding', 'heatmap', 'novelty'}
    assert max(largest.values()) < 1e-4
    weights = sum(p.numel() for p in net.parameters())
    assert .9*4*weights < path.stat().st_size < 4*weights + 2e6
    assert check_model_file(path)['provenance'] == dict(arch=arch)
    x = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    whole = run_model(path, x, batch=9)
    for batch in (1, 2, 4):
        parts = run_model(path, x, batch=batch)
        for name, value in parts.items(): assert np.allclose(value, whole[name], atol=1e-4)
    assert run_model(path, x[:0])['probabilities'].shape == (0, 3)
