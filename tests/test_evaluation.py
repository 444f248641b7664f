"""The linear probe and retrieval with several captions; the command on a model of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipfast import train
from clipfast.emoji import data, demo as emoji_demo, evaluate
from clipfast.models import caption_retrieval, linear_probe


def clusters(n: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 3
    return torch.eye(3, 5)[labels] * 7 + spread * torch.randn(n, 5), labels


def test_a_probe_finds_what_is_linear() -> None:
    features, labels = clusters(120, 1.0)
    assert linear_probe(features[:90], labels[:90], features[90:], labels[90:]) > 0.9
    noise = torch.randn(90, 5)
    assert linear_probe(noise, labels[:90], torch.randn(300, 5), torch.arange(300) % 3) < 0.5


def test_a_probe_equals_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(150, 4.0)
    mean, deviation = features[:90].mean(0), features[:90].std(0)
    scaled = ((features - mean) / deviation).double().numpy()
    peer = linear_model.LogisticRegression(C=1 / (0.01 * 90), tol=1e-8, max_iter=1000).fit(scaled[:90], labels[:90])
    expected = peer.score(scaled[90:], labels[90:])
    assert linear_probe(features[:90], labels[:90], features[90:], labels[90:], [0.01]) == pytest.approx(expected)


def test_each_image_has_several_captions() -> None:
    images = torch.eye(4)
    texts = torch.eye(4).unsqueeze(1) + torch.tensor([0.1, -0.1]).view(1, 2, 1)
    assert caption_retrieval(images, texts)["image_to_text_R@1"] == 1
    swapped = texts[[1, 0, 2, 3]]
    assert caption_retrieval(images, swapped)["text_to_image_R@1"] == 0.5


def test_wrong_arguments_are_named() -> None:
    x, labels = torch.randn(6, 2), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^labels: got"):
        linear_probe(x, labels[:5], x, labels)
    with pytest.raises(ValueError, match=r"^features: got 4 rows"):
        linear_probe(x[:4], labels[:4], x, labels)
    with pytest.raises(ValueError, match=r"^text_features: got"):
        caption_retrieval(x, x)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    concepts = emoji_demo.read_concepts(others=["twemoji"])
    few = [concept for index, concept in enumerate(concepts) if index % 40 == 0 or concept.name == "kangaroo"]
    for module in (data, emoji_demo, evaluate):
        monkeypatch.setattr(module, "read_concepts", lambda others=(): few)
    emoji_demo.run(emoji_demo.Demo(str(tmp_path), steps=2, batch_size=16), emoji_demo.Emoji())
    assert evaluate.main([str(tmp_path / "model.pt")]) == 0
    told = [capsys.readouterr().out]
    lines = told[0].splitlines()
    assert [line.split(",")[0] for line in lines] == ["kind"] * 2 + ["5 captions"] * 6 + ["digits"] * 3
    assert float(lines[-1].split()[-1].rstrip("%")) > 90  # a probe on the digits' pixels

    flags = "--dataset-type openmoji --model vit-tiny --text cbow --precision fp32 --batch-size 16 --workers 0"
    assert train.main([*flags.split(), "--epochs", "1", "--logs", str(tmp_path), "--name", "trained"]) == 0
    step = next((tmp_path / "trained").glob("step-*"))
    for path in (tmp_path / "trained", step):
        capsys.readouterr()
        assert evaluate.main([str(path)]) == 0
        told.append(capsys.readouterr().out)
    assert told[1] == told[2]
    assert len(told[1].splitlines()) == len(lines)

    (tmp_path / "empty").mkdir()
    (tmp_path / "trained" / "tokenizer.json").write_text("{}")
    (tmp_path / "broken.pt").write_bytes(b"no model")
    for name, message in (
        ("broken.pt", "is no model of clipfast.emoji"),
        ("none.pt", "there is no file"),
        ("empty", "holds no step"),
        ("trained", "is no checkpoint of clipfast.train"),
    ):
        assert evaluate.main([str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
