"""The book's code: its names and signatures, chapters 4 to 7 -> the same numbers, faster, by one changed import.

"Build a Large Language Model (From Scratch)", github.com/rasbt/LLMs-from-scratch; the package `llms-from-scratch` has
the same names in `ch04`, `ch05` and `ch07`. To be read in this order:

    model.py       the model, its parameters by the book's names: `GPTModel`, `TransformerBlock`, ...
    training.py    losses of packed batches, the training loop: `calc_loss_batch`, `train_model_simple`, ...
    generation.py  text, token by token over a cache: `generate`, `generate_text_simple`, ...
    weights.py     OpenAI's weights into a model: `load_weights_into_gpt`
    data.py        instructions -> batches: `InstructionDataset`, `custom_collate_fn`, `format_input`, ...
    judge.py       a score of each response by a model in Ollama: `query_model`, `generate_model_scores`
"""

from fastft.integrations.book.data import (
    InstructionDataset,
    custom_collate_fn,
    download_and_load_file,
    format_input,
)
from fastft.integrations.book.generation import (
    generate,
    generate_and_print_sample,
    generate_text_simple,
    text_to_token_ids,
    token_ids_to_text,
)
from fastft.integrations.book.judge import check_if_running, generate_model_scores, query_model
from fastft.integrations.book.model import (
    GELU,
    FeedForward,
    GPTModel,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
)
from fastft.integrations.book.training import (
    calc_loss_batch,
    calc_loss_loader,
    evaluate_model,
    plot_losses,
    train_model_simple,
)
from fastft.integrations.book.weights import load_weights_into_gpt

__all__ = [
    "GELU",
    "FeedForward",
    "GPTModel",
    "InstructionDataset",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "calc_loss_batch",
    "calc_loss_loader",
    "check_if_running",
    "custom_collate_fn",
    "download_and_load_file",
    "evaluate_model",
    "format_input",
    "generate",
    "generate_and_print_sample",
    "generate_model_scores",
    "generate_text_simple",
    "load_weights_into_gpt",
    "plot_losses",
    "query_model",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]
