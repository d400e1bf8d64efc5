"""The real entailment model, as a tiny cross-encoder with random weights that is made here."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder

from looper_schemas.scoring import Arm, Question, RewardMode, ScoredQuestion
from regime_w.cross_encoder import CrossEncoderEntailer
from regime_w.judges import JudgeUnavailable
from regime_w.scorer import Scorer
from regime_w.settings import RegimeWSettings

TEXT = "the baker packs six boxes with four rolls each and sells half of them for three dollars"
WORDS = TEXT.split()
LABELS = {0: "contradiction", 1: "entailment", 2: "neutral"}
WINDOW = 32
PAIRS = [
    (" ".join(WORDS[i : i + 5]), " ".join(WORDS[j : j + n])) for i in range(6) for j in (1, 8) for n in (2, 4)
]


def make_model(folder: Path, labels: dict[int, str]) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=WINDOW)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=WINDOW, id2label=labels,
        label2id={name: index for index, name in labels.items()}, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "nli", LABELS)


@pytest.fixture(scope="module")
def model(folder: Path) -> CrossEncoderEntailer:
    return CrossEncoderEntailer(str(folder), device="cpu", streams=2)


def test_probabilities_are_those_of_the_library(model: CrossEncoderEntailer, folder: Path) -> None:
    library = CrossEncoder(str(folder), device="cpu").predict(PAIRS, batch_size=1, apply_softmax=True)
    # Sums over threads differ.
    assert model.entailed(PAIRS) == pytest.approx(library[:, 1].tolist(), abs=1e-5)
    assert max(library[:, 1]) - min(library[:, 1]) > 0.05  # the weights do tell pairs apart


def test_a_pair_has_the_same_bits_alone_and_in_any_company(model: CrossEncoderEntailer) -> None:
    together = dict(zip(PAIRS, model.entailed(PAIRS), strict=True))
    rng = random.Random(1)
    for _ in range(20):
        some = rng.sample(PAIRS, rng.randint(1, len(PAIRS)))
        assert model.entailed(some) == [together[pair] for pair in some]


def test_pieces_are_the_whole_text_and_two_of_them_fit_the_window(model: CrossEncoderEntailer) -> None:
    text = " ".join(WORDS * 7)
    pieces = model.pieces(text)
    assert " ".join(piece.text for piece in pieces) == text
    assert sum(piece.tokens for piece in pieces) == 7 * len(WORDS)
    assert 2 * max(piece.tokens for piece in pieces) + 3 <= WINDOW


def test_a_model_without_a_label_of_entailment_is_refused(tmp_path: Path) -> None:
    sentiment = make_model(tmp_path / "sentiment", {0: "bad", 1: "good"})
    with pytest.raises(JudgeUnavailable, match="entailment"):
        CrossEncoderEntailer(str(sentiment), device="cpu")


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeUnavailable, match="cannot be read"):
        CrossEncoderEntailer(str(tmp_path), device="cpu")


def test_a_name_that_is_nowhere_is_refused() -> None:
    with pytest.raises(JudgeUnavailable, match="was not found"):
        CrossEncoderEntailer("nobody/nothing", device="cpu")


def test_other_weights_and_another_label_are_another_identity(
    model: CrossEncoderEntailer, folder: Path, tmp_path: Path
) -> None:
    assert CrossEncoderEntailer(str(folder), device="cpu").identity == model.identity
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert CrossEncoderEntailer(str(copied), device="cpu").identity == model.identity
    config = json.loads((copied / "config.json").read_text())
    config["id2label"] = {"0": "entailment", "1": "contradiction", "2": "neutral"}
    (copied / "config.json").write_text(json.dumps(config))
    assert CrossEncoderEntailer(str(copied), device="cpu").identity != model.identity


def test_a_scorer_takes_the_judge_from_its_settings(folder: Path, tmp_path: Path) -> None:
    settings = RegimeWSettings(
        judge="nli", judge_model=str(folder), embedding_device="cpu", copies_threshold=None
    )
    texts = ["the baker packs six boxes", "four rolls each and half of them"]
    question = Question(
        id="q", question="?", gold_answer="1", arms=tuple(Arm(id=t, reasoning=t) for t in texts)
    )
    scorer = Scorer(settings)
    results = [scorer.score([question], RewardMode.ARM, fresh=fresh)[0] for fresh in (False, True)]
    assert results[0] == results[1]
    assert isinstance(results[0], ScoredQuestion)
    assert results[0].scores is not None
    probabilities = CrossEncoder(str(folder), device="cpu").predict(
        [(texts[0], texts[1]), (texts[1], texts[0])], batch_size=1, apply_softmax=True
    )
    assert results[0].scores.s_cf == pytest.approx(min(probabilities[:, 1]), abs=1e-6)
    moved = settings.model_copy(update={"judge_model": str(shutil.copytree(folder, tmp_path / "moved"))})
    assert Scorer(moved).scorer_id == scorer.scorer_id
    assert Scorer(RegimeWSettings(embedding_device="cpu")).scorer_id != scorer.scorer_id
