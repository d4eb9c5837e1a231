"""A small byte-level tokenizer with the special tokens and the chat template of a known model."""

import functools
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's own."""
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{%- for message in messages %}"
    "{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{% generation %}{{- message.content.lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{%- endif %}"
    "{{- '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIAL = {
    CHATML: ("<|im_start|>", "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    LLAMA3: (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    QWEN3: (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    MISTRAL: ("<s>", "</s>", ["<s>", "</s>"]),
}
CORPUS = [
    "Hello world\n\n",
    "user\n",
    "assistant\n",
    "system\n",
    "What is it?\n",
    " a cat's 12:30",
    "32*32",
] * 3


@functools.cache
def byte_level_tokenizer(special: tuple[str, ...]) -> Any:
    """Train a tokenizer of 400 tokens; text is cut as by GPT-2, so line ends and words may share a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def chat_tokenizer(template: str, bos: str | None = None, eos: str | None = None) -> Any:
    """Return a tokenizer of transformers with one of the templates above, or another with ChatML's tokens."""
    from transformers import PreTrainedTokenizerFast

    known_bos, known_eos, special = SPECIAL.get(template, SPECIAL[CHATML])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(tuple(special)),
        bos_token=bos or known_bos,
        eos_token=eos or known_eos,
    )
    if template == QWEN3:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer
