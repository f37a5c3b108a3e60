"""config.json of published models, at their real sizes."""

from made import tiny_hf

OPT_6_7B = tiny_hf.CASES["opt"] | {
    "vocab_size": 50272, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "eos_token_id": None,
}  # fmt: skip
CHATGLM2_6B = tiny_hf.CASES["chatglm"] | {
    "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "kv_channels": 128,
    "num_attention_heads": 32, "seq_length": 32768, "eos_token_id": None,
}  # fmt: skip
