"""What quantisation does to the demo model's held-out texts, and to heavy-tailed weights.

    python -m benchmarks quality --json FILE

Damage is the rise of perplexity, exp(mean over tokens of the loss's rise) - 1, on windows of
`WINDOW` tokens of each held-out text; its 95 % interval is Student's, over windows, paired: each
window is its own control. The loss of one text moves with the sign of every rounding error, so the
same is measured in `draws` of the rounding: the model with its channels permuted, which changes
nothing but who shares a group with whom; a window's rise is the mean over draws. Beside it the KL
divergence from the unquantised model, which has no such sign, and so less noise. `share` is a
method's damage as a share of plain rounding's, its interval a bootstrap over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import glm4
import glm4_kernels as gk
from glm4.hub import DEMO
from glm4.model import Config, Model, Weight
from glm4.quantization_policy import INT8, LINEAR, POLICIES, Form, Policy, preparer

TEXTS = ("en", "es", "prose")
WINDOW = 1024
DRAWS = 4
BOOTSTRAPS = 2000

Weights = dict[str, Tensor]
Quantiser = Callable[[Config, Weights], dict[str, Weight]]


def with_head(form: Form) -> Policy:
    return {**dict.fromkeys(LINEAR, form), "lm_head": INT8}


CONTENDERS: dict[str, Policy] = {
    "RTN, max/7": with_head(Form(4, 128, method="max/7")),
    "RTN, min-max": with_head(Form(4, 128, symmetric=False, method="nearest")),
    "nearest": with_head(Form(4, 128, method="nearest")),
    "search": with_head(Form(4, 128)),
    "search, zero points": with_head(Form(4, 128, symmetric=False)),
    "hqq": with_head(Form(4, 128, symmetric=False, method="hqq")),
    "int4": POLICIES["int4"],
    "int4 g32, RTN max/7": dict.fromkeys(LINEAR, Form(4, 32, method="max/7")),
    "int4 g32, search": dict.fromkeys(LINEAR, Form(4, 32)),
    "int8": POLICIES["int8"],
}
DEFAULT, BASELINES = "int4", ("RTN, max/7", "RTN, min-max", "nearest")


def max_over_7(weight: Tensor, group_size: int) -> Tensor:
    """Plain rounding as most tools do it: scale = max |w| / 7, codes -8..7; dequantised."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).float()
    return ((groups / scale.clamp(min=1e-30)).round().clamp(-8, 7) * scale).flatten(1)


def quantised(config: Config, weights: Weights, policy: Policy) -> Weights:
    """Every weight, the linear ones rounded by `policy`, as floats."""
    known = {name: form for name, form in policy.items() if form.method != "max/7"}
    prepare = preparer(known, config)
    made = {}
    for name, weight in weights.items():
        form = policy.get(name.rpartition(".")[2])
        ready = prepare(name, weight)
        if form is not None and form.method == "max/7":
            assert form.group_size is not None
            ready = max_over_7(weight, form.group_size)
        made[name] = ready if isinstance(ready, Tensor) else ready.dequantize()
    return made


def bits_per_weight(config: Config, policy: Policy) -> float:
    """Over all linear weights, scales and zero points counted."""
    bits = weights = 0.0
    for name, shape in config.shapes.items():
        form = policy.get(name.rpartition(".")[2])
        if form is None:
            continue
        n, k = shape
        zero = 0 if form.symmetric else 16 if form.method == "hqq" else form.bits
        bits += n * k * form.bits + n * (k // (form.group_size or k)) * (16 + zero)
        weights += n * k
    return bits / weights


def demo() -> tuple[Config, Weights]:
    """The demo model's tensors, fp32."""
    weights: Weights = {}
    model = glm4.load("demo", device="cpu", dtype="float32", progress=False)
    weights["embedding"], weights["lm_head"] = model.embedding, model.lm_head
    weights["norm"] = model.blocks[-1].next_norm
    for i, block in enumerate(model.blocks):
        own = f"layers.{i}."
        parts = {
            "input_norm": model.first_norm if i == 0 else model.blocks[i - 1].next_norm,
            "qkv": block.attention.qkv,
            "qkv_bias": block.attention.qkv_bias,
            "o": block.attention.o,
            "post_attention_norm": block.post_attention_norm,
            "mlp_norm": block.mlp_norm,
            "gate_up": block.mlp.gate_up,
            "down": block.mlp.down,
            "post_mlp_norm": block.post_mlp_norm,
        }
        weights |= {own + name: part for name, part in parts.items() if part is not None}
    return model.config, {name: weights[name] for name in model.config.shapes}


def permuted(config: Config, weights: Weights, seed: int) -> Weights:
    """The same function of tokens, its channels in another order: those of the residual, of each
    layer's MLP, and of v within each head. Seed 0 is the order as stored."""
    if seed == 0:
        return weights
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden, generator=generator)
    made = {}
    for name, weight in weights.items():
        kind = name.rpartition(".")[2]
        if kind == "gate_up":
            ffn = torch.randperm(config.ffn, generator=generator)
            weight = weight[torch.cat((ffn, ffn + config.ffn))]
        elif kind in ("qkv", "qkv_bias"):
            if kind == "qkv":
                v = torch.randperm(config.head_dim, generator=generator)
            first = (config.heads + config.kv_heads) * config.head_dim
            heads = weight[first:].unflatten(0, (config.kv_heads, config.head_dim))
            weight = torch.cat((weight[:first], heads[:, v].flatten(0, 1)))
        elif kind == "o":
            weight = weight.unflatten(1, (config.heads, config.head_dim))[:, :, v].flatten(1)
        elif kind == "down":
            weight = weight[:, ffn]
        if kind in ("o", "down"):
            weight = weight[hidden]
        elif kind != "qkv_bias":
            weight = weight[..., hidden]
        made[name] = weight.contiguous()
    return made


def windows(text: str, tokenizer: Tokenizer) -> Tensor:
    """[n, WINDOW + 1] token ids: each window's last is the next one's first."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids[: (len(ids) - 1) // WINDOW * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)


@torch.inference_mode()
def losses(model: Model, ids: Tensor, sure: Tensor | None = None) -> tuple[float, float, Tensor]:
    """(nats a token, KL from `sure`, log-probabilities [T, V]) of one window."""
    log_p = F.log_softmax(model.logits(ids[None, :-1])[0], dim=-1)
    loss = F.nll_loss(log_p, ids[1:]).item()
    kl = 0.0 if sure is None else (sure.exp() * (sure - log_p)).sum(-1).mean().item()
    return loss, kl, log_p


def measure_draw(
    contenders: dict[str, Policy], draw: int, limit: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Of one draw of the rounding, window by window: every contender's rise of the loss, and its
    KL divergence. `limit`: so many windows of each text only."""
    config, weights = demo()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    texts = {
        text: windows((DEMO / f"heldout.{text}.txt").read_text("utf-8"), tokenizer)[:limit]
        for text in TEXTS
    }
    n_windows = sum(map(len, texts.values()))
    base = Model(config, weights, torch.device("cpu"), torch.float32)
    drawn = permuted(config, weights, draw)
    models = {}
    for name, policy in contenders.items():
        say(f"quantising: {name}")
        made = quantised(config, drawn, policy)
        models[name] = Model(config, made, torch.device("cpu"), torch.float32)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for i, ids in enumerate(ids for batch in texts.values() for ids in batch):
        say(f"window {i + 1} of {n_windows}")
        loss, _, sure = losses(base, ids)
        for name, model in models.items():
            theirs, kl, _ = losses(model, ids, sure)
            found[name].append((theirs - loss, kl))
    return {
        "windows": {text: len(ids) for text, ids in texts.items()},
        "bits_per_weight": {n: bits_per_weight(config, p) for n, p in contenders.items()},
        "rise": {name: [rise for rise, _ in pairs] for name, pairs in found.items()},
        "kl": {name: [kl for _, kl in pairs] for name, pairs in found.items()},
    }


def summary(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """What several draws of the same windows say together."""
    first = draws[0]
    where = [text for text, n in first["windows"].items() for _ in range(n)]
    rise, kl = (
        {
            name: torch.tensor([draw[what][name] for draw in draws], dtype=torch.float64).mean(0)
            for name in first[what]
        }
        for what in ("rise", "kl")
    )
    return {
        "model": "demo",
        "draws": len(draws),
        "window": WINDOW,
        "windows": first["windows"],
        "contenders": [
            {
                "name": name,
                "bits_per_weight": bits,
                "all": interval(rise[name]),
                **{text: interval(rise[name][[w == text for w in where]]) for text in TEXTS},
                "kl_nats": plain_interval(kl[name]),
                "share": {o: share(rise[name], rise[o]) for o in BASELINES if o in rise},
                "kl_share": {o: share(kl[name], kl[o]) for o in BASELINES if o in kl},
            }
            for name, bits in first["bits_per_weight"].items()
        ],
    }


def plain_interval(x: Tensor) -> dict[str, float]:
    """Mean and half the 95 % interval of Student's t, by its expansion (1e-3 from 20 values on)."""
    n = len(x)
    t = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2
    return {"mean": x.mean().item(), "half": t * x.std().item() / math.sqrt(n)}


def interval(rise: Tensor) -> dict[str, float]:
    """Of the relative rise in perplexity."""
    nats = plain_interval(rise)
    mean = math.expm1(nats["mean"])
    return {"mean": mean, "half": (1 + mean) * nats["half"]}


def share(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Ratio of the means, and its 95 % interval by a paired bootstrap over windows."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ours), (BOOTSTRAPS, len(ours)), generator=generator)
    ratios = torch.expm1(ours[picks].mean(1)) / torch.expm1(theirs[picks].mean(1))
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return {
        "mean": math.expm1(ours.mean().item()) / math.expm1(theirs.mean().item()),
        "low": low,
        "high": high,
    }


def tails() -> dict[str, Tensor]:
    """Weights of known tails, [1024, 1024]."""
    torch.manual_seed(0)
    shape = (1024, 1024)
    return {
        "normal": torch.randn(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student's t, 3 degrees": torch.distributions.StudentT(3.0).sample(shape),
        "normal, 1 column in 97 8-fold": torch.randn(shape)
        * (1 + 7 * (torch.arange(shape[1]) % 97 == 0)),
    }


def layer_errors() -> list[dict[str, Any]]:
    """int4, groups of 128: squared error over squared weight."""
    rows = []
    for name, weight in tails().items():
        made = {"RTN, max/7": max_over_7(weight, 128)}
        for label, symmetric, method in (
            ("RTN, min-max", False, "nearest"),
            ("nearest", True, "nearest"),
            ("search", True, "search"),
            ("search, zero points", False, "search"),
            ("hqq", False, "hqq"),
        ):
            made[label] = gk.quantize(weight, 4, 128, symmetric, method).dequantize()
        square = weight.square().sum()
        errors = {who: ((w - weight).square().sum() / square).item() for who, w in made.items()}
        rows.append({"weights": name, "relative_squared_error": errors})
    return rows
