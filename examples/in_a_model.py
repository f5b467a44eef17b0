"""A language model of transformers with attngen in the place of its attention: windows in turn, soft-capped scores and a padded
batch, as in Gemma 2, with random weights, against the library's eager attention.

    python examples/in_a_model.py [--n 1024] [--layers 4]
"""

from __future__ import annotations

import argparse

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from verdict import FLOAT32, here, relative, timed, verdict

from attngen.integrations.transformers import register


@torch.no_grad()
def main(n: int, layers: int) -> None:
    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, sliding_window=n // 8, attn_logit_softcapping=20.0, pad_token_id=0,
        max_position_embeddings=2 * n, tie_word_embeddings=False,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).to(device).eval()
    ids = torch.randint(1, 1000, (2, n), device=device)
    there = torch.ones_like(ids)
    there[0, : n // 4] = 0  # the shorter prompt is padded on the left
    print(f"{layers} layers, windows of {n // 8} in every other, prompts of {3 * n // 4} and {n} tokens, {device}")

    logits, taken, tokens = {}, {}, {}
    for implementation in ("eager", "attngen"):
        model.set_attn_implementation(implementation)
        (logits[implementation], taken[implementation]) = timed(lambda: model(ids, attention_mask=there).logits, 3)
        print(f"  {implementation}: {taken[implementation] * 1e3:.0f} ms for the prompts")
        tokens[implementation] = model.generate(ids, attention_mask=there, max_new_tokens=16, do_sample=False)
    same = torch.equal(*tokens.values())
    print(f"  the same 16 tokens generated: {same}")
    real = there.bool()
    verdict(
        "a model gives what it gives with eager attention",
        relative(logits["attngen"][real], logits["eager"][real]) if same else torch.inf,
        FLOAT32,
        f"{taken['eager'] / taken['attngen']:.2f}x as fast as eager on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1024, help="tokens of the longer prompt")
    parser.add_argument("--layers", type=int, default=4)
    main(**vars(parser.parse_args()))
