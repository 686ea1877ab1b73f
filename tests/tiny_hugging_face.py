"""Tiny models of `transformers` with random weights, as folders."""

import string
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1},
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # the first tokens of RoBERTa and its kin
# Ranks draw other random numbers than one process.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def save_bert(folder: Path, **more: Any) -> Path:
    """A tiny BERT with its tokenizer, one token a letter."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    names += [f"##{letter}" for letter in string.ascii_lowercase]
    transformers.BertTokenizer(vocab={name: n for n, name in enumerate(names)}).save_pretrained(
        folder
    )
    sizes = {**SIZES, "vocab_size": 60, "max_position_embeddings": 24, **more}
    config = transformers.BertConfig(**sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_dual_encoder(folder: Path, **more: Any) -> Path:
    """ViT and BERT."""
    text = transformers.AutoConfig.from_pretrained(save_bert(folder, **more))
    build = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
    config = build(transformers.ViTConfig(**{**VISION, **more}), text, projection_dim=16)
    transformers.VisionTextDualEncoderModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(
        folder
    )
    return folder


def save_mpnet(folder: Path) -> Path:
    """A tiny MPNet with its tokenizer, one token a letter."""
    names = [*SPECIAL, *string.ascii_lowercase]
    names += [f"##{letter}" for letter in string.ascii_lowercase]
    transformers.MPNetTokenizer(
        vocab={name: n for n, name in enumerate(names)}, unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.MPNetConfig(**SIZES, vocab_size=60, max_position_embeddings=26)
    transformers.MPNetModel(config).save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    """A tiny RoBERTa with its tokenizer, one token a letter."""
    numbers = {piece: n for n, piece in enumerate([*SPECIAL, "Ġ", *string.ascii_lowercase])}
    transformers.RobertaTokenizer(vocab=numbers, merges=[]).save_pretrained(folder)
    config = transformers.RobertaConfig(**SIZES, vocab_size=60, max_position_embeddings=26)
    transformers.RobertaModel(config).save_pretrained(folder)
    return folder


def save_xlm_roberta(folder: Path, kind: str = "XLMRoberta") -> Path:
    """A tiny XLM-RoBERTa with its tokenizer, one token a letter; or a kind that is built alike."""
    pieces = [*SPECIAL, "▁", *string.ascii_lowercase]
    vocabulary = [(piece, -2.0 * (piece not in SPECIAL)) for piece in pieces]
    getattr(transformers, f"{kind}Tokenizer")(vocab=vocabulary).save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": 60, "max_position_embeddings": 26}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    text = {**SIZES, "max_position_embeddings": 24, "vocab_size": 60, "projection_size": 32}
    save_bert(folder)
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


SMALL = {**SIZES, "vocab_size": 40, "max_position_embeddings": 26, "pad_token_id": 1}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
TEXT_MODELS: dict[str, dict[str, Any]] = {  # by their kind, with the sizes of a tiny one
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2"), SMALL),
    "distilbert": {**SMALL, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 40},
    **dict.fromkeys(("qwen3", "gemma"), GROUPED),
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 1, "num_heads": 2},
}


def save_text_model(folder: Path, kind: str) -> Path:
    """A tiny text model of a kind with a tokenizer of one token a letter."""
    numbers = {piece: n for n, piece in enumerate([*SPECIAL, " ", *string.ascii_lowercase])}
    letters = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("<s>", numbers["<s>"]), ("</s>", numbers["</s>"])]
    letters.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **names).save_pretrained(folder)
    settings = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **{**TEXT_MODELS[kind], **settings})
    opener = transformers.AutoModelForTextEncoding if kind == "t5" else transformers.AutoModel
    opener.from_config(config).save_pretrained(folder)
    return folder
