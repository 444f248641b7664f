"""The loss from the encoders' outputs on: value and all gradients, three ways; what it saves, makes and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error
from ranks import Failed, Ranks
from torch import Tensor
from training_ranks import projected as of_a_rank

import clipfast
from benchmarks.environment import SavedStorages
from clipfast import operators, projected, reference
from clipfast.models import CLIP, Config, create_model

NAMES = ("image_features", "text_features", "w_i", "w_t", "t")


def operands(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    shapes = (n, 24), (m, 40), (24, 16), (40, 16)
    tensors = [torch.randn(shape, generator=generator) / shape[0] ** 0.25 for shape in shapes]
    return tuple(t.to(dtype).requires_grad_() for t in (*tensors, torch.tensor(2.66)))


def computed(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss, leaves)


def plain_layers(images: Tensor, texts: Tensor, w_i: Tensor, w_t: Tensor, t: Tensor) -> Tensor:
    x, y = (torch.nn.functional.normalize(product.float(), dim=1) for product in (images @ w_i, texts @ w_t))
    logits, labels = t.float().exp() * x @ y.T, torch.arange(len(x))
    return sum(torch.nn.functional.cross_entropy(z, labels) for z in (logits, logits.T[: len(x)])) / 2  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (50, 50), (130, 257)])
def test_three_ways(backend: str, n: int, m: int, dtype: torch.dtype) -> None:
    leaves = operands(n, m, dtype)
    exact_leaves = tuple(t.detach().double().requires_grad_() for t in leaves)
    exact = computed(reference.clip_loss(*exact_leaves), exact_leaves)
    peer = computed(plain_layers(*leaves), leaves)
    got = computed(
        clipfast.projected_contrastive_loss(
            *leaves[:4], leaves[4].float().exp() if dtype.itemsize < 4 else leaves[4].exp(), backend=backend
        ),
        leaves,
    )
    for name, a, b, c in zip(("loss", *NAMES), got, peer, exact, strict=True):
        # The rows may be normalized in their dtype.
        eps = torch.finfo(dtype).eps * (1 if name == "loss" else 4)
        size = c.abs().max().item()
        assert error(a, c) <= 2 * error(b, c) + eps * size + 4 * torch.finfo(torch.float32).eps, name
        assert a.dtype == b.dtype or name == "loss", name


IDS = {"image_ids": torch.arange(60) % 17}
OPTIONS: dict[str, dict[str, Any]] = {
    "ids, smoothing": IDS | {"same_id": "positive", "label_smoothing": 0.1},
    "ignored ids": IDS | {"direction": "text_to_image"},
    "unreduced": {"reduction": "none"},
    "nothing kept": {"keep_bytes": 0},
}


@pytest.mark.needs("ids", "ranks")
@pytest.mark.parametrize("options", OPTIONS)
def test_options_and_biases(backend: str, options: str) -> None:
    """In float64's arithmetic of the composition, whose gradients are torch's."""
    *leaves, t = operands(60, 60, torch.float32)
    biases = [torch.randn(16).requires_grad_() for _ in range(2)]
    chosen: dict[str, Any] = OPTIONS[options] | {"return_metrics": True, "backend": backend}
    loss, metrics = clipfast.projected_contrastive_loss(*leaves, t.exp(), 0.5, b_i=biases[0], b_t=biases[1], **chosen)
    got = torch.autograd.grad(loss.sum(), (*leaves, t, *biases))
    inputs = [tensor.detach().double().requires_grad_() for tensor in (*leaves, t, *biases)]
    x, y = inputs[0] @ inputs[2] + inputs[5], inputs[1] @ inputs[3] + inputs[6]
    exact, counted = clipfast.contrastive_loss(
        x, y, inputs[4].exp(), 0.5, normalize=True, **chosen | {"backend": "torch"}
    )
    assert error(loss, exact) <= 1e-5
    assert metrics == counted
    for a, b in zip(got, torch.autograd.grad(exact.sum(), inputs), strict=True):
        assert error(a, b) <= 1e-5 * max(1, b.abs().max().item())


def test_a_bias_for_each_candidate(backend: str) -> None:
    images, texts, w_i, w_t, t = operands(20, 20, torch.float32)
    bias = torch.randn(20)
    loss = clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), bias, backend=backend)
    expected = clipfast.contrastive_loss(images @ w_i, texts @ w_t, t.exp(), bias, normalize=True, backend=backend)
    assert torch.equal(loss, expected)


def test_weights_of_any_strides(backend: str) -> None:
    """As those of nn.Linear, which has W^T."""
    images, texts, w_i, w_t, t = operands(50, 50, torch.float32)
    expected = computed(
        clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), backend=backend), (w_i, w_t)
    )
    layers = [w.detach().T.contiguous().requires_grad_() for w in (w_i, w_t)]
    loss = clipfast.projected_contrastive_loss(images, texts, *(w.T for w in layers), t.exp(), backend=backend)
    for a, b in zip(computed(loss, tuple(layers)), expected, strict=True):
        assert error(a.T if a.ndim else a, b) <= 1e-5


@pytest.mark.parametrize("frozen", [(), (0,), (2,), (0, 1), (2, 3), (1, 3), (0, 1, 2, 3)])
def test_products_that_somebody_wants(backend: str, frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = operands(30, 30, torch.float32)
    whole = computed(clipfast.projected_contrastive_loss(*leaves[:4], leaves[4].exp(), backend=backend), leaves)
    made = []

    def summed(a: Tensor, b: Tensor) -> Tensor:
        made.append(a.shape)
        return a @ b

    monkeypatch.setattr(projected, "summed", summed)
    inputs = [t.detach() if i in frozen else t for i, t in enumerate(leaves[:4])]
    loss = clipfast.projected_contrastive_loss(*inputs, leaves[4].exp(), backend=backend)
    wanted = [i for i in range(5) if i not in frozen]
    for i, gradient in zip(wanted, torch.autograd.grad(loss, [leaves[i] for i in wanted]), strict=True):
        assert error(gradient, whole[i + 1]) <= 1e-6
    assert len(made) == 4 - len(frozen)


def test_repeats_bitwise_and_with_a_kept_graph(backend: str) -> None:
    leaves = operands(130, 257, torch.bfloat16)
    losses = [clipfast.projected_contrastive_loss(*leaves[:4], 14.3, backend=backend) for _ in range(2)]
    results = [torch.autograd.grad(loss, leaves[:4], retain_graph=True) for loss in (losses[0], *losses)]
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_over_ranks(ranks: Ranks) -> None:
    """The matrices' gradients are sums over ranks, which the wrapper of a model takes."""
    images, texts, *others = operands(11, 11, torch.float64)
    leaves = [(images[part], texts[part], *others) for part in (slice(0, 4), slice(4, 11))]
    whole = (images, texts, *others)
    loss = clipfast.projected_contrastive_loss(*whole[:4], others[2].exp(), label_smoothing=0.1)
    expected = computed(loss, whole)
    first, second = ranks.run(of_a_rank, [tuple(t.detach() for t in of_rank) for of_rank in leaves], ranks=range(2))
    assert not isinstance(first, Failed), first
    got = (first[0], *(torch.cat((first[i], second[i])) for i in (1, 2)), *(first[i] + second[i] for i in (3, 4, 5)))
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) <= 1e-12


def test_rows_without_length_and_without_number(backend: str) -> None:
    """A row that is projected to zero stays zero; a NaN is the dense formula's."""
    images, texts, w_i, w_t, t = (o.detach() for o in operands(40, 40, torch.float32))
    images[3] = 0
    exact = reference.clip_loss(images.double(), texts.double(), w_i.double(), w_t.double(), t.double())
    assert error(clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), backend=backend), exact) <= 1e-5
    images[5, 2] = torch.nan
    leaves = tuple(tensor.requires_grad_() for tensor in (images, texts, w_i, w_t))
    loss = clipfast.projected_contrastive_loss(*leaves, t.exp(), backend=backend)
    assert all(value.isnan().any() for value in computed(loss, leaves))


def test_float16_has_range_for_the_weights(backend: str) -> None:
    """Gradients of rows, over n, are below float16's range where those of the weights are not."""
    leaves = operands(64, 64, torch.float16)[:4]
    loss = clipfast.projected_contrastive_loss(*leaves, 14.3, backend=backend) * 1e-4
    wide = tuple(t.detach().double().requires_grad_() for t in leaves)
    exact = reference.clip_loss(*wide, torch.tensor(14.3, dtype=torch.float64).log()) * 1e-4
    for a, b in zip(torch.autograd.grad(loss, leaves[2:]), torch.autograd.grad(exact, wide[2:]), strict=True):
        assert error(a, b) <= 0.01 * b.abs().max() + 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "test", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(backend: str, test: str, dtype: torch.dtype) -> None:
    *leaves, t = operands(6, 7, dtype)
    scale, bias = t.detach().float().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    b_i = torch.randn(16, dtype=dtype).requires_grad_()
    options = (True, 0.1, "both", "mean", "ignore", False, backend)
    arguments = (*leaves, scale, bias, b_i, None, None, None, dtype, True, True, True, True, *options)
    torch.library.opcheck(operators.projected_contrastive_loss.operator, arguments, test_utils=test)


def test_compiles_as_one_graph_with_a_dynamic_batch(backend: str) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    def loss(images: Tensor, texts: Tensor, w_i: Tensor, w_t: Tensor, s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return clipfast.projected_contrastive_loss(images, texts, w_i, w_t, s, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 9, 32):
        leaves = operands(n, n, torch.float32)
        for a, b in zip(computed(compiled(*leaves), leaves), computed(loss(*leaves), leaves), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1


def test_functional_gradient(backend: str) -> None:
    arguments = tuple(t.detach() for t in operands(8, 8, torch.float32))

    def loss(*inputs: Tensor) -> Tensor:
        return clipfast.projected_contrastive_loss(*inputs[:4], inputs[4].exp(), backend=backend)

    for wanted in ((0, 1, 2, 3, 4), (2, 4)):
        got, exact = (torch.func.grad(f, argnums=wanted)(*arguments) for f in (loss, reference.clip_loss))
        torch.testing.assert_close(got, exact)
    images = torch.randn(3, 8, 24)
    got, exact = (
        torch.func.vmap(f, in_dims=(0, *[None] * 4))(images, *arguments[1:]) for f in (loss, reference.clip_loss)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("patch_size", [8, None])
def test_the_reference_clip_trains_through_it(patch_size: int | None) -> None:
    """With the gradients of embeddings and `ContrastiveLoss`, and the parameters it had."""
    layers: Any = 1 if patch_size else (1, 1)
    torch.manual_seed(1)
    model = create_model(Config(16, 32, layers, 16, 2, patch_size, 1, 16, 2), 50, 7)
    names = {name for name in model.state_dict() if name.startswith("head.")}
    assert names == {"head.w_i", "head.w_t", "head.logit_scale"} | ({"head.b_i"} if patch_size is None else set())
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 49, (6, 7))
    assert isinstance(model, CLIP)
    results = []
    for loss in (model.loss(images, tokens), clipfast.ContrastiveLoss()(**model(images, tokens))):
        model.zero_grad()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= 1e-5 * max(1, b.abs().max().item())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step()
    assert model.loss(images, tokens) < results[0][0]


def test_what_is_saved_is_inputs_and_embeddings(backend: str) -> None:
    """No normalized copy: the projected rows, the inputs, and vectors: statistics and factors."""
    images, texts, w_i, w_t, t = operands(500, 600, torch.float32)
    with SavedStorages() as saved:
        clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), keep_bytes=0, backend=backend)
    inputs, embeddings = sum(tensor.nbytes for tensor in (images, texts, w_i, w_t)), (500 + 600) * 16 * 4
    assert saved.total <= inputs + embeddings + 8 * (2 * 500 + 600) + 4 * (500 + 600) + 256


def test_autocast_and_two_dtypes(backend: str) -> None:
    images, texts, w_i, w_t, t = operands(40, 40, torch.float32)
    half = clipfast.projected_contrastive_loss(images.bfloat16(), texts.bfloat16(), w_i, w_t, t.exp(), backend=backend)
    exact = reference.clip_loss(images.bfloat16().float(), texts.bfloat16().float(), w_i, w_t, t)
    assert error(half, exact) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        loss = clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), backend=backend)
    assert loss.dtype == torch.float32
    assert error(loss, exact) <= 0.05
    with torch.autocast("cpu", torch.bfloat16):
        plain = clipfast.contrastive_loss(images @ w_i, texts @ w_t, t.exp(), normalize=True, backend=backend)
    assert error(loss, plain) <= 1e-3  # both round the rows, not all alike
    for gradient, expected in zip(computed(loss, (images, w_i)), computed(plain, (images, w_i)), strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, expected) <= 0.01 * expected.abs().max()


def test_what_it_refuses() -> None:
    images, texts, w_i, w_t, t = operands(4, 4, torch.float32)
    for arguments, options, failure, text in (
        ((images, texts, w_t, w_i), {}, ValueError, "w_i: got shape .40, 16.; its rows must be the columns of image"),
        ((images, texts, w_i, w_t[:, :3]), {}, ValueError, "text_features: got shape .4, 3.; its d must be"),
        ((images, texts, w_i, w_t), {"b_t": w_i[0, :3]}, ValueError, "b_t: got shape .3.; accepted is one number for"),
        ((images, texts, w_i, w_t), {"b_i": 1.0}, TypeError, "b_i: got float; accepted is a torch.Tensor or None"),
        ((images, texts, w_i, w_t), {"scale": 1.0}, TypeError, "scale: not an option; accepted are normalize, label_"),
        ((images, texts, w_i, 3.0), {}, TypeError, "w_t: got float; accepted is a torch.Tensor"),
        ((images, texts, w_i, w_t), {"normalize": False}, TypeError, "normalize: not an option; projected"),
    ):
        with pytest.raises(failure, match=text):
            clipfast.projected_contrastive_loss(*arguments, t, **options)  # type: ignore[arg-type]
