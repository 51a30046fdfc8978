"""Coverage and bit-identity over many models, with the truth from an independent witness of what really ran."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.find.sites import find_sites
from tests.zoo.awkward import MODELS, make_awkward
from tests.zoo.families import make_family
from tests.zoo.score import Score, bit_differences, score_coverage, summary
from tests.zoo.truth import witness

# built from their configurations alone; those with functional, shared and written-out activations first
QUICK = ("albert", "mamba", "openai-gpt", "mobilebert")
FAMILIES = (
    "albert",
    "mamba",
    "openai-gpt",
    "bloom",
    "lfm2",
    "flaubert",
    "gpt_oss",
    "mobilebert",
    "glmasr_encoder",
    "xlm",
    "falcon_mamba",
    "granitemoeshared",
    "pegasus_x",
    "zaya",
    "convbert",
    "modernbert",
    "mpt",
    "rembert",
    "smollm3",
    "stablelm",
    "vit",
    "apertus",
    "beit",
    "bert-generation",
    "big_bird",
    "biogpt",
    "clip_vision_model",
    "cohere2",
    "jais2",
    "mlcd",
    "opt",
    "phi",
    "qwen2",
    "qwen3",
    "radio",
    "roberta",
    "splinter",
    "tapas",
    "bart",
    "bert",
    "bitnet",
    "camembert",
    "clip_text_model",
    "cohere",
    "data2vec-vision",
    "internvl_vision",
    "molmo2_text",
    "mvp",
    "nomic_bert",
    "olmo",
    "persimmon",
    "phi3",
    "qwen2_moe",
    "t5",
    "aya_vision",
    "blenderbot-small",
    "deberta-v2",
    "gemma2",
    "mixtral",
    "mt5",
    "prophetnet",
    "roformer",
    "xlnet",
    "yolos",
    "gemma",
)


def assert_all_found(scores: list[Score]) -> None:
    print("\n" + summary(scores))
    problems = {
        score.name: (score.missed, score.false_positives, score.problems)
        for score in scores
        if score.missed or score.false_positives or score.problems
    }
    assert problems == {}
    assert all(score.own == score.hidden for score in scores)


def score_family(name: str) -> Score:
    model, run = make_family(name)
    score = score_coverage(name, model, run)
    for train in (False, True):
        score.problems += bit_differences(model, run, train, score.report)
    return score


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_hand_made_models() -> None:
    scores = [score_coverage(name, *make_awkward(name)) for name in MODELS]
    assert sum(sum(score.hidden.values()) for score in scores) > 100
    assert {kind for score in scores for kind in score.hidden} == {"module", "shared", "functional", "written"}
    assert_all_found(scores)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", QUICK)
def test_a_few_families(name: str) -> None:
    pytest.importorskip("transformers")
    assert_all_found([score_family(name)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_families_of_transformers() -> None:
    pytest.importorskip("transformers")
    scores: list[Score] = []
    for name in FAMILIES:
        numpy.random.seed(0)
        scores.append(score_family(name))
    assert len(scores) >= 60
    assert_all_found(scores)


class TestWitness:
    """The witness itself must be able to say no."""

    def test_tells_hidden_activations_from_gates(self) -> None:
        model, run = make_awkward("Gates")
        with torch.no_grad():
            events = witness(model.eval(), run)
        assert [(e.op, e.hidden) for e in events] == [
            ("relu", True),
            ("sigmoid", False),
            ("hardsigmoid", False),
            ("softplus", False),
            ("tanh", False),
            ("sigmoid", False),
            ("tanh", False),
            ("tanh", False),
        ]

    def test_sees_what_is_not_wrapped(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(x) + torch.tanh(x)

        model, x = Two(), torch.randn(4)
        wrap(model, find_sites(model), 0.1)
        with torch.no_grad():
            events = witness(model, lambda m: m(x))
        assert [(e.op, e.kind, e.sites) for e in events] == [("relu", "module", ["act"]), ("tanh", "functional", [])]
