"""The bundled demo model is complete, small, and as good as its metrics.json says."""

import json
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer

DEMO = Path(__file__).parents[1] / "glm4" / "demo"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((DEMO / "metrics.json").read_text("utf-8"))


def test_folder_fits():
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 8_000_000


def test_tokenizer_round_trips(tokenizer):
    texts = [path.read_text("utf-8") for path in sorted(DEMO.glob("heldout.*.txt"))]
    texts.append(
        "Don't — ¿qué? 漢字 \N{GRINNING FACE}\n\n  12345 <|user|"
    )  # bytes outside the corpus
    assert len(texts) == 4
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_follow_the_vocabulary(tokenizer):
    config = json.loads((DEMO / "config.json").read_text("utf-8"))
    first = tokenizer.get_vocab_size(with_added_tokens=False)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(first, first + len(ids)))
    assert config["vocab_size"] == math.ceil(tokenizer.get_vocab_size() / 64) * 64
    assert tokenizer.encode("").tokens == ["[gMASK]", "<sop>"]
    stops = [
        tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    generation = json.loads((DEMO / "generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == generation["eos_token_id"] == stops


def test_held_out_books_were_not_trained_on(metrics):
    trained = {*metrics["books"]["train"], *metrics["books"]["validation"]}
    for name, row in metrics["heldout"].items():
        assert (DEMO / name).stat().st_size == row["bytes"]
        assert row["books"] and not trained & set(row["books"])


def test_model_beats_ngram(metrics):
    for name, row in metrics["heldout"].items():
        assert row["model_bits_per_byte"] < row["ngram_bits_per_byte"], name


def test_transformers_reproduces_the_opening(metrics, tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    assert type(model).__name__ == "Glm4ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"]
    prefix = 2  # [gMASK]<sop>
    for name, row in metrics["heldout"].items():
        text = (DEMO / name).read_text("utf-8")[: metrics["opening_characters"]]
        ids = torch.tensor(tokenizer.encode(text).ids)
        assert len(ids) <= metrics["context"]
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :-1]).logits[0, prefix - 1 :].double()
        nats = torch.nn.functional.cross_entropy(logits, ids[prefix:], reduction="sum").item()
        bits_per_byte = nats / math.log(2) / len(text.encode())
        assert bits_per_byte == pytest.approx(row["opening_model_bits_per_byte"], rel=1e-4)
