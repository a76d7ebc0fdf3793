"""The random LM: its tokenizer loses no text, and a fused word is the sum of its parts."""

import torch

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.lm.scratch import ScratchLanguageModel

TEXT = "onetwo largeredring What is red? onethree smallbluering"
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, **LAYERS}


def lm(fused: list[str] | None = None) -> ScratchLanguageModel:
    text = [Sample("a", (), (Turn(f" {TEXT}", "ring"),))]
    return ScratchLanguageModel(text, tokenizer_samples=1, vocab_size=400, fused=fused, **SIZES)


def test_a_fused_word_is_the_sum_of_its_parts():
    tower = lm(["onetwo+largeredring", "onethree+unseen"])
    ids = tower.tokenizer(" onetwo+largeredring onethree+unseen red?", return_tensors="pt")["input_ids"]
    table = tower.model.get_input_embeddings().weight
    plain = tower.tokenizer(" red?")["input_ids"]
    assert ids.shape == (1, 2 + len(plain)) and ids[0, 2:].tolist() == plain
    found = tower.embed(ids)[0]
    for place, words in enumerate((" onetwo largeredring", " onethree unseen")):
        parts = tower.tokenizer(words)["input_ids"]
        torch.testing.assert_close(found[place], sum(table[i] for i in parts), rtol=0, atol=1e-6)
    assert torch.equal(found[2:], table[plain])


def test_gradients_reach_the_parts():
    tower = lm(["onetwo+largeredring"])
    tower.embed(tower.tokenizer(" onetwo+largeredring", return_tensors="pt")["input_ids"]).sum().backward()
    touched = tower.model.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == sorted(set(tower.tokenizer(" onetwo largeredring")["input_ids"]))


def test_fused_words_are_no_part_of_what_is_saved():
    tower, plain = lm(["onetwo+largeredring"]), lm()
    assert len(tower.plain_tokenizer) == len(plain.tokenizer) == tower.model.config.vocab_size
    assert tower.state_dict().keys() == plain.state_dict().keys()
    word = " onetwo+largeredring"
    assert tower.plain_tokenizer(word)["input_ids"] == plain.tokenizer(word)["input_ids"]
